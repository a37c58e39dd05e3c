"""Turns the original distribution of a data set into input/ and target/, without changing a pixel.

    python -m utils.prepare ~/Downloads/rain_data_test_Light Datasets/Rain200L/test
    python -m utils.prepare ~/Downloads/Rain800/training Datasets/Rain800/train --clean_half left

Pictures are linked (--copy copies them); halves of a picture are written as PNG. What has no partner is listed.
"""

import argparse
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset_RGB import Pair, target_names
from utils.errors import UserError, listed, reports_errors, sentence
from utils.files import atomic_write
from utils.formats import read_picture
from utils.images import find_pictures, read_image, write_png

# How rainy and clean pictures are called in the original distributions: paths below the source, in lower case, without
# their endings. A picture is a rainy one if its name fits and its clean one, by a name beside it, is there.
LAYOUTS = [
    (r"(.*)rain/(?:x2/)?(.+)x2", [r"\1norain/\2"]),  # Rain200L, Rain200H
    (r"(.*)rainy_image/(.+)_\d+", [r"\1ground_truth/\2"]),  # DDN-Data
    (r"(.*?)(?:rainy/)?rain-(\d+)", [r"\1norain-\2", r"\1norain/norain-\2"]),  # Rain100L, Rain100H
    (r"(.*)real_world/(.+)_rain_\d+", [r"\1real_world_gt/\2_gt", r"\1real_world/\2_gt"]),  # SPA-Data, training
    (r"(.*)rain/(.+?)(?:_rain)?", [r"\1gt/\2gt", r"\1gt/\2_gt", r"\1gt/\2", r"\1norain/\2"]),  # SPA-Data, test
    (r"(.+)_in", [r"\1_gt"]),  # Rain12
    (r"(.*)(?:input|rainy)/(.+)", [r"\1target/\2", r"\1gt/\2", r"\1norain/\2", r"\1clean/\2"]),  # as others pass on
]


def pairs_by_layout(source, results):
    """-> list of Pair, list of sentences on pictures that belong to none; those in the folders `results` are left
    out."""
    paths, root = find_pictures(source, results)
    by_name = {path.relative_to(root).with_suffix("").as_posix().lower(): path for path in paths}
    pairs = []
    for name, path in by_name.items():
        candidates = (
            found.expand(template)
            for pattern, templates in LAYOUTS
            if (found := re.fullmatch(pattern, name))
            for template in templates
        )
        clean = next((candidate for candidate in candidates if candidate in by_name and candidate != name), None)
        if clean:
            pairs.append(Pair(path, by_name[clean]))
    used = {path for pair in pairs for path in (pair.input, pair.target)}
    return pairs, [f"{path} belongs to no pair" for path in paths if path not in used]


def pairs_of_list(path):
    """Pairs of a text file with a rainy and a clean path on each line, below the file's folder, as SPA-Data has
    -> list of Pair, and an empty list as nothing can be left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no list of pairs: unpack it, and give the folder that this makes.") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        names = line.split()
        if names and len(names) != 2:
            raise UserError(f"{path}, line {number}: expected a rainy and a clean path, found {line!r}.")
        if names:
            pairs.append(Pair(*(path.parent / name.lstrip("/") for name in names)))
    missing = [file for pair in pairs for file in (pair.input, pair.target) if not file.is_file()]
    if missing or not pairs:
        raise UserError(f"{path} names {len(missing)} files that do not exist: {', '.join(map(str, missing[:3]))}.")
    return pairs, []


def new_names(pairs):
    """-> list of (name of the rainy, name of the clean picture) that dataset_RGB pairs: the original names where it
    does so, else the clean picture's, numbered where it has several rainy ones."""
    rainy_of = Counter(pair.target for pair in pairs)
    numbers, names = Counter(), []
    for pair in pairs:
        rainy, clean = pair.input.stem, pair.target.stem
        if clean not in target_names(rainy):
            clean = re.sub(r"_?gt$", "", clean, flags=re.IGNORECASE)
            numbers[clean] += 1
            rainy = f"{clean}_{numbers[clean]}" if rainy_of[pair.target] > 1 else clean
        names.append((rainy, clean))
    return names


def place(source, destination, copy):
    """Makes `destination` a link to, or a copy of, `source`; the same file found there already is left alone."""
    if destination.is_symlink() or destination.exists():
        if destination.exists() and destination.samefile(source):
            return
        if not (copy and destination.is_file() and destination.read_bytes() == source.read_bytes()):
            raise UserError(f"{destination} is there already and is not {source}: remove it or choose another folder.")
    elif copy:
        with open(source, "rb") as original, atomic_write(destination) as file:
            shutil.copyfileobj(original, file)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(source.resolve(), destination)
        except OSError as error:
            raise UserError(f"{destination} cannot be a link ({error.strerror}): say --copy.") from error


def place_pairs(pairs, destination, copy):
    files = {}  # where they go: what goes there
    for pair, names in zip(pairs, new_names(pairs)):
        for folder, name, path in zip(("input", "target"), names, (pair.input, pair.target)):
            other = files.setdefault(destination / folder / f"{name}{path.suffix}", path)
            if other != path:
                raise UserError(f"{path} and {other} have one name: prepare their folders one by one.")
    for new, path in tqdm(files.items(), unit="picture", disable=None):
        place(path, new, copy)


def split_halves(pairs, root, destination):
    """Writes the halves of pictures as PNG, in the folders that they have below `root` -> number of pairs, list of
    sentences on pictures that were left out."""
    problems, new = [], {}
    for pair in pairs:
        name = pair.input.relative_to(root).with_suffix(".png")
        if new.setdefault(name, pair) != pair:
            problems.append(f"{pair.input} and {new[name].input} have one name")
    done = 0
    for name, pair in tqdm(new.items(), unit="picture", disable=None):
        try:
            mode, bits = mode_of(pair.input), 8 * read_picture(pair.input).pixels.itemsize
            if mode not in ("RGB", "L") or bits > 8:
                raise UserError(f"{pair.input} would lose something as 8-bit RGB (its mode is {mode}, {bits} bits).")
            for folder, image in zip(("input", "target"), pair.read()):
                path = destination / folder / name
                if path.exists() and not np.array_equal(read_image(path), image):
                    raise UserError(f"{path} is there already and is another picture than the half of {pair.input}.")
                write_png(path, np.ascontiguousarray(image))
            done += 1
        except UserError as error:
            problems.append(sentence(error))
    return done, problems


def mode_of(path):
    try:
        with Image.open(path) as picture:
            return picture.mode
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture ({error}).") from error


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the original distribution, or SPA-Data's list of pairs")
    parser.add_argument("destination", type=Path, help="where input/ and target/ go")
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking to them")
    parser.add_argument("--clean_half", choices=("left", "right"), help="split pictures that hold both side by side")
    args = parser.parse_args(argv)
    results = [args.destination / folder for folder in ("input", "target")]
    if args.clean_half:
        paths, root = find_pictures(args.source, results)
        pairs = [Pair(path, path, args.clean_half) for path in paths]
        count, left_out = split_halves(pairs, root, args.destination)
    else:
        is_list = args.source.is_file()
        pairs, left_out = pairs_of_list(args.source) if is_list else pairs_by_layout(args.source, results)
        if not pairs:
            raise UserError(
                f"{args.source} is laid out like none of the distributions in Datasets/README.md: put rainy pictures "
                f"into {args.destination}/input and clean ones of the same names into {args.destination}/target."
            )
        place_pairs(pairs, args.destination, args.copy)
        count = len(pairs)
    print(f"{count} pairs in {args.destination}; `python dataset_RGB.py {args.destination}` examines them")
    if left_out:
        raise UserError(f"{len(left_out)} pictures were left out:{listed(left_out, 10)}")


if __name__ == "__main__":
    main()
