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

from utils.files import UserError, counted, listed, reports_errors, sentence
from utils.pairs import DATASETS, known_dataset, pair_folder

THUMBNAIL = 16  # pixels a side
MOST = 10  # findings of a kind that are printed


class Look(NamedTuple):
    """What is remembered of a picture."""

    size: tuple  # width, height
    digest: bytes  # of the pixels
    thumbnail: np.ndarray  # THUMBNAIL² grey levels


def look(image):
    """H×W×3 uint8 -> Look."""
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).mean(axis=2)
    digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes() + str(image.shape).encode(), digest_size=16)
    return Look(image.shape[1::-1], digest.digest(), small.round().astype(np.uint8).ravel())


def examine(pairs, name):
    """Reads all pairs -> dicts of path: Look of the rainy and of the clean pictures, list of sentences about what is
    wrong."""

    def looks_of(pair):
        try:
            return [look(image) for image in pair.read()]
        except UserError as error:
            return error

    rainy, clean, problems = {}, {}, []
    with ThreadPoolExecutor() as pool:
        looks = tqdm(pool.map(looks_of, pairs), name, len(pairs), unit="pair", disable=None)
        for pair, found in zip(pairs, looks):
            if isinstance(found, UserError):
                problems.append(sentence(found))
                continue
            rainy[pair.input], clean[pair.target] = found
            if found[0].digest == found[1].digest:
                problems.append(f"{pair.input} is the same picture as its clean one")
    return rainy, clean, problems


def equal_pictures(looks):
    """-> list of sentences about files with exactly the same pixels."""
    paths_of = defaultdict(list)
    for path, found in looks.items():
        paths_of[found.digest].append(str(path))
    return [" = ".join(paths) for paths in paths_of.values() if len(paths) > 1]


def overlap(train, test, block=4096):
    """-> list of sentences about clean pictures of the test set that training would show: those whose thumbnails differ
    by less than one of 255 levels (root mean square), so that copies of other sizes and formats are found, too."""
    found, train_paths, test_paths = [], list(train), list(test)
    queries = np.array([test[path].thumbnail for path in test_paths], np.float32).reshape(-1, THUMBNAIL**2)
    for start in range(0, len(train), block):
        keys = np.array([train[path].thumbnail for path in train_paths[start : start + block]], np.float32)
        squares = (queries**2).sum(1)[:, None] + (keys**2).sum(1) - 2 * queries @ keys.T
        for query, key in zip(*np.nonzero(squares < THUMBNAIL**2)):
            found.append(f"{test_paths[query]} looks like {train_paths[start + key]}")
    return found


def sizes_of(looks, most=4):
    """-> the commonest sizes of pictures and how many have them, such as "481×321 (120), 321×481 (80)"."""
    counts = Counter(found.size for found in looks.values()).most_common()
    sizes = [f"{width}×{height} ({count})" for (width, height), count in counts]
    return ", ".join(sizes[:most]) + (f" and {len(sizes) - most} more sizes" if len(sizes) > most else "")


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with train/ and test/, or with input/ and target/")
    parser.add_argument("--clean_half", choices=("left", "right"), help="of pictures that hold both side by side")
    args = parser.parse_args(argv)
    folders = [args.root / name for name in ("train", "test") if (args.root / name).is_dir()]
    dataset = known_dataset(args.root)
    published = {"train": DATASETS[dataset].train_pairs, "test": DATASETS[dataset].test_pairs} if dataset else {}
    unusable, miscounted, leaks, equal_rainy, equal_clean, clean_looks = [], [], [], [], [], {}
    for folder in folders or [args.root]:
        try:
            pairs, unpaired = pair_folder(folder, args.clean_half)
        except UserError as error:
            unusable.append(sentence(error))
            continue
        rainy, clean, problems = examine(pairs, str(folder))
        unusable += unpaired + problems
        equal_rainy += equal_pictures(rainy)
        equal_clean += equal_pictures(clean)
        clean_looks[folder.name] = clean
        expected = published.get("train" if folder.name == "train" else "test")
        beside = f" of {expected} published" if dataset else ""
        print(f"{folder}: {counted(len(pairs), 'pair')}{beside}, {len(clean)} clean pictures; {sizes_of(rainy)}")
        if dataset and len(pairs) != expected:
            miscounted.append(f"{folder} has {counted(len(pairs), 'pair')}, {dataset} has {expected}")
    for name, count in published.items():
        if folders and count and not (args.root / name).is_dir():
            miscounted.append(f"{args.root / name} is missing, {dataset} has {count} pairs in it")
    if {"train", "test"} <= set(clean_looks):
        leaks = overlap(clean_looks["train"], clean_looks["test"])
    findings = {
        "cannot be used": unusable,
        "not the published number of pairs": miscounted,
        "clean pictures in both train and test": leaks,
        "note: rainy pictures with the same pixels": equal_rainy,
        "note: clean pictures with the same pixels": equal_clean,
    }
    for kind, sentences in findings.items():
        if sentences:
            print(f"{kind} ({len(sentences)}):{listed(sentences, MOST)}")
    if unusable or miscounted or leaks:
        sys.exit(1)
    print("no problems found")


if __name__ == "__main__":
    main()
