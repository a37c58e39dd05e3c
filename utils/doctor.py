"""Says what a data set holds and what is wrong with it.

    python -m utils.doctor Datasets/Rain200L

compares the number of pairs with the published one, and finds pictures without a partner, broken ones, unequal sizes,
equal pictures, and clean ones that are in both train/ and test/. The exit status is 1 if something is wrong.
"""

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from utils.files import UserError, counted, listed, reports_errors
from utils.pairs import DATASETS, known_dataset, pair_folder

THUMBNAIL = 16  # pixels a side


class Fingerprint(NamedTuple):
    """What is remembered of a picture."""

    size: str  # width×height
    digest: bytes  # of the pixels
    thumbnail: np.ndarray  # THUMBNAIL² grey levels


def fingerprint(image):
    """H×W×3 uint8 -> Fingerprint."""
    size = f"{image.shape[1]}×{image.shape[0]}"
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).mean(axis=2)
    digest = hashlib.sha256(size.encode() + image.tobytes()).digest()
    return Fingerprint(size, digest, small.round().astype(np.uint8).ravel())


def examine(pairs, name):
    """Reads all pairs -> dicts of path: Fingerprint of the rainy and of the clean pictures, list of sentences about
    those that cannot be used."""

    def fingerprints_of(pair):
        try:
            return [fingerprint(image) for image in pair.read()]
        except UserError as error:
            return error

    rainy, clean, problems = {}, {}, []
    with ThreadPoolExecutor() as pool:
        fingerprints = tqdm(pool.map(fingerprints_of, pairs), name, len(pairs), unit="pair", disable=None)
        for pair, found in zip(pairs, fingerprints):
            if isinstance(found, UserError):
                problems.append(str(found))
                continue
            rainy[pair.input], clean[pair.target] = found
            if found[0].digest == found[1].digest:
                problems.append(f"{pair.input} is the same picture as its clean one")
    return rainy, clean, problems


def equal_pictures(fingerprints):
    """-> list of sentences about files with exactly the same pixels."""
    paths_of = defaultdict(list)
    for path, found in fingerprints.items():
        paths_of[found.digest].append(str(path))
    return [" = ".join(paths) for paths in paths_of.values() if len(paths) > 1]


def overlap(train, test):
    """-> list of sentences about clean pictures of the test set that training would show: those whose thumbnails differ
    by less than one of 255 levels (root mean square), so that copies of other sizes and formats are found, too."""
    paths, thumbnails = list(train), np.array([found.thumbnail for found in train.values()], np.float32)
    lines = []
    for path, found in test.items():
        differences = ((thumbnails - found.thumbnail) ** 2).mean(axis=1)
        lines += [f"{path} looks like {paths[i]}" for i in np.flatnonzero(differences < 1)]
    return lines


def sizes_of(fingerprints):
    """-> the commonest sizes of pictures and how many have them, such as "481×321 (120), 321×481 (80)"."""
    counts = Counter(found.size for found in fingerprints.values()).most_common()
    sizes = ", ".join(f"{size} ({count})" for size, count in counts[:4])
    return f"{sizes} and {len(counts) - 4} more sizes" if len(counts) > 4 else sizes


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with train/ and test/, or with input/ and target/")
    parser.add_argument("--clean_half", choices=("left", "right"), help="of pictures that hold both side by side")
    args = parser.parse_args(argv)
    recipe = DATASETS.get(known_dataset(args.root))
    unusable, miscounted, leaks, equal, clean_fingerprints = [], [], [], [], {}
    for folder in [args.root / name for name in ("train", "test") if (args.root / name).is_dir()] or [args.root]:
        try:
            pairs, unpaired = pair_folder(folder, args.clean_half)
        except UserError as error:
            unusable.append(str(error))
            continue
        rainy, clean, problems = examine(pairs, str(folder))
        unusable += unpaired + problems
        equal += equal_pictures(rainy) + equal_pictures(clean)
        clean_fingerprints[folder.name] = clean
        count, published = counted(len(pairs), "pair"), ""
        if recipe:
            expected = recipe.train_pairs if folder.name == "train" else recipe.test_pairs
            published = f" of {expected} published"
            if len(pairs) != expected:
                miscounted.append(f"{folder} has {count} instead of {expected}")
        print(f"{folder}: {count}{published}, {counted(len(clean), 'clean picture')}; {sizes_of(rainy)}")
    if clean_fingerprints.get("train") and clean_fingerprints.get("test"):
        leaks = overlap(clean_fingerprints["train"], clean_fingerprints["test"])
    findings = {
        "cannot be used": unusable,
        "not the published number of pairs": miscounted,
        "clean pictures in both train and test": leaks,
        "note: pictures with the same pixels": equal,
    }
    for kind, lines in findings.items():
        if lines:
            print(f"{kind} ({len(lines)}):{listed(lines, 10)}")
    if unusable or miscounted or leaks:
        sys.exit(1)
    print("no problems found")


if __name__ == "__main__":
    main()
