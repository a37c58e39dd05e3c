"""Examines a data set: what it holds, and what is wrong with it. The command is dataset_RGB.py."""

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

from dataset_RGB import DATASETS, known_dataset, pair_folder
from utils.errors import UserError, listed, reports_errors, sentence

THUMBNAIL = 16  # pixels a side
MOST = 10  # findings of a kind that are printed


class Look(NamedTuple):
    """What is remembered of a picture: (height, width), a digest of its pixels, and a small grey copy."""

    size: tuple
    digest: bytes
    thumbnail: np.ndarray

    @classmethod
    def at(cls, image):
        small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes() + str(image.shape).encode(), digest_size=16)
        return cls(image.shape[:2], digest.digest(), small.mean(axis=2).round().astype(np.uint8).ravel())


class Part(NamedTuple):
    """A folder with pairs: how many there are, dicts of path -> Look, and sentences about what is wrong."""

    folder: Path
    pairs: int
    rainy: dict
    clean: dict
    problems: list


def examine(folder, clean_half=None):
    """Reads all pictures of a folder with input/ and target/ (or of halves side by side) -> Part."""
    pairs, problems = pair_folder(folder, clean_half)

    def look(pair):
        try:
            return [Look.at(image) for image in pair.read()]
        except UserError as error:
            return str(error)

    rainy, clean = {}, {}
    with ThreadPoolExecutor() as pool:
        for pair, found in zip(pairs, tqdm(pool.map(look, pairs), str(folder), len(pairs), unit="pair", disable=None)):
            if isinstance(found, str):
                problems.append(found)
                continue
            rainy[pair.input], clean[pair.target] = found
            if found[0].digest == found[1].digest:
                problems.append(f"{pair.input} is the same picture as its clean one")
    return Part(folder, len(pairs), rainy, clean, problems)


def equal_pictures(looks):
    """-> list of sentences about files with exactly the same pixels."""
    groups = defaultdict(list)
    for path, look in looks.items():
        groups[look.digest].append(str(path))
    return [" = ".join(paths) for paths in groups.values() if len(paths) > 1]


def overlap(train, test, block=4096):
    """-> list of sentences about clean pictures of the test set that training would show: pictures whose thumbnails
    differ by less than one of 255 levels (root mean square), so that other sizes and formats are found, too."""
    found, train_paths = [], list(train)
    queries = np.array([look.thumbnail for look in test.values()], np.float32).reshape(-1, THUMBNAIL**2)
    for start in range(0, len(train), block):
        keys = np.array([train[path].thumbnail for path in train_paths[start : start + block]], np.float32)
        squares = (queries**2).sum(1)[:, None] + (keys**2).sum(1) - 2 * queries @ keys.T
        for query, key in zip(*np.nonzero(squares < THUMBNAIL**2)):
            found.append(f"{list(test)[query]} looks like {train_paths[start + key]}")
    return found


def published_pairs(part, dataset):
    """How many pairs a data set should have here; None where that is not known."""
    if dataset is None:
        return None
    return DATASETS[dataset].train_pairs if part.folder.name == "train" else DATASETS[dataset].test_pairs


def describe(part, dataset):
    """-> a line with the number of pairs beside the published one and the commonest sizes."""
    published = f" of {published_pairs(part, dataset)} published" if dataset else ""
    sizes = Counter(look.size for look in part.rainy.values()).most_common()
    shown = ", ".join(f"{width}×{height} ({count})" for (height, width), count in sizes[:4])
    more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
    return f"{part.folder}: {part.pairs} pairs{published}, {len(part.clean)} clean pictures; {shown}{more}"


def count_problems(root, parts, dataset):
    """-> list of sentences about parts that are not there or do not have the published number of pairs."""
    if dataset is None:
        return []
    found = {part.folder.name for part in parts}
    problems = [
        f"{part.folder} has {part.pairs} pairs, {dataset} has {published_pairs(part, dataset)}"
        for part in parts
        if part.pairs != published_pairs(part, dataset)
    ]
    if found & {"train", "test"} and root.name not in ("train", "test"):
        for name, pairs in (("train", DATASETS[dataset].train_pairs), ("test", DATASETS[dataset].test_pairs)):
            if pairs and name not in found:
                problems.append(f"{root / name} is not there, {dataset} has {pairs} pairs in it")
    return problems


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="dataset_RGB.py", description="Says what a data set holds and what is wrong with it."
    )
    parser.add_argument("root", type=Path, help="folder with train/ and test/, or with input/ and target/")
    parser.add_argument("--clean_half", choices=("left", "right"), help="pictures hold both halves side by side")
    args = parser.parse_args(argv)
    folders = [args.root / name for name in ("train", "test") if (args.root / name).is_dir()] or [args.root]
    dataset = known_dataset(args.root)
    parts, unusable = [], []
    for folder in folders:
        try:
            parts.append(examine(folder, args.clean_half))
        except UserError as error:
            unusable.append(sentence(error))
    for part in parts:
        print(describe(part, dataset))
    by_name = {part.folder.name: part for part in parts}
    leaks = overlap(by_name["train"].clean, by_name["test"].clean) if {"train", "test"} <= set(by_name) else []
    problems = {
        "cannot be used": [*unusable, *(problem for part in parts for problem in part.problems)],
        "not the published number of pairs": count_problems(args.root, parts, dataset),
        "clean pictures in both train and test": leaks,
    }
    notes = {
        f"note: {kind} pictures with the same pixels": [
            s for part in parts for s in equal_pictures(getattr(part, kind))
        ]
        for kind in ("rainy", "clean")
    }
    for kind, sentences in (problems | notes).items():
        if sentences:
            print(f"{kind} ({len(sentences)}):{listed(sentences, MOST)}")
    if any(problems.values()):
        sys.exit(1)
    print("nothing is wrong with it")
