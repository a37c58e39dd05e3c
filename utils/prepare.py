"""Turns the original distribution of a data set into input/ and target/, without changing a pixel.

    python -m utils.prepare ~/Downloads/rain_data_test_Light Datasets/Rain200L/test
    python -m utils.prepare ~/Downloads/Rain800/training Datasets/Rain800/train --clean_half left

Pictures are linked (--copy copies them); halves of a picture are written as PNG. What has no partner is listed.
"""

import argparse
import filecmp
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.files import UserError, atomic_write, counted, listed, reports_errors
from utils.pairs import Pair, target_names
from utils.pictures import find_pictures, from_channels, read_picture, to_channels, write_picture

# Names of rainy and clean pictures in the original distributions: paths below the source, in lower case, without
# endings. A picture is a rainy one if its name fits and a clean one of a name beside it is there.
LAYOUTS = [
    (r"(.*)rain/(?:x2/)?(.+)x2", [r"\1norain/\2"]),  # Rain200L, Rain200H
    (r"(.*)rainy_image/(.+)_\d+", [r"\1ground_truth/\2"]),  # DDN-Data
    (r"(.*?)(?:rainy/)?rain-(\d+)", [r"\1norain-\2", r"\1norain/norain-\2"]),  # Rain100L, Rain100H
    (r"(.*)real_world/(.+)_rain_\d+", [r"\1real_world_gt/\2_gt", r"\1real_world/\2_gt"]),  # SPA-Data, training
    (r"(.*)rain/(.+?)(?:_rain)?", [r"\1gt/\2gt", r"\1gt/\2_gt", r"\1gt/\2", r"\1norain/\2"]),  # SPA-Data, test
    (r"(.+)_in", [r"\1_gt"]),  # Rain12
    (r"(.*)(?:input|rainy)/(.+)", [r"\1target/\2", r"\1gt/\2", r"\1norain/\2", r"\1clean/\2"]),  # redistributed
]


def pairs_by_layout(source, results):
    """-> list of Pair, list of sentences about pictures that belong to none; those in the folders `results` are left
    out."""
    paths, root = find_pictures(source, results)
    by_name = {path.relative_to(root).with_suffix("").as_posix().lower(): path for path in paths}
    pairs = []
    for name, path in by_name.items():
        matches = [(re.fullmatch(pattern, name), templates) for pattern, templates in LAYOUTS]
        candidates = [match.expand(template) for match, templates in matches if match for template in templates]
        clean = next((by_name[other] for other in candidates if other in by_name), None)
        if clean:
            pairs.append(Pair(path, clean))
    used = {path for pair in pairs for path in (pair.input, pair.target)}
    return pairs, [f"{path} belongs to no pair" for path in paths if path not in used]


def pairs_of_list(path):
    """-> list of Pair of a text file with a rainy and a clean path on each line, below its folder, as SPA-Data has."""
    pairs = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        paths = [path.parent / name.lstrip("/") for name in line.split()]
        if len(paths) == 2 and all(map(os.path.isfile, paths)):
            pairs.append(Pair(*paths))
        elif paths:
            raise UserError(f"{path}, line {number}: {line[:99]!r} names no rainy and clean picture: correct it.")
    return pairs


def new_names(pairs):
    """-> list of (rainy name, clean name) by which pictures are paired: the original ones where these do, else the
    clean picture's, numbered where it has several rainy ones."""
    rainy_of, numbers, names = Counter(pair.target for pair in pairs), Counter(), []
    for pair in pairs:
        rainy, clean = pair.input.stem, pair.target.stem
        if clean not in target_names(rainy):
            clean = re.sub(r"_?gt$", "", clean, flags=re.IGNORECASE)
            numbers[clean] += 1
            rainy = f"{clean}_{numbers[clean]}" if rainy_of[pair.target] > 1 else clean
        names.append((rainy + pair.input.suffix, clean + pair.target.suffix))
    return names


def place(source, destination, copy):
    """Makes `destination` a link to `source` or a copy of it; one that exists is left alone."""
    if os.path.lexists(destination):
        if not (destination.exists() and filecmp.cmp(source, destination)):
            raise UserError(f"{destination} already exists and is not {source}: remove it or choose another folder.")
    elif copy:
        with open(source, "rb") as original, atomic_write(destination) as file:
            shutil.copyfileobj(original, file)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            destination.symlink_to(source.resolve())
        except OSError as error:
            raise UserError(f"{destination} cannot be a link ({error.strerror}): use --copy.") from error


def place_pairs(pairs, folders, copy):
    """Links or copies pairs into the folders input/ and target/."""
    sources = {}  # by where they go
    for pair, names in zip(pairs, new_names(pairs)):
        for path, folder, name in zip((pair.input, pair.target), folders, names):
            if sources.setdefault(folder / name, path) != path:
                raise UserError(f"{path} and {sources[folder / name]} have the same name: prepare folders one by one.")
    for destination, source in tqdm(sources.items(), unit="picture", disable=None):
        place(source, destination, copy)


def split_picture(path, outputs):
    """Writes the left and right half of a picture to two paths; those that exist are left alone. Raises UserError."""
    pixels = np.atleast_3d(to_channels(read_picture(path)))
    if pixels.shape[1] % 2:
        raise UserError(f"{path} is {pixels.shape[1]} pixels wide: two equal halves need an even width.")
    for output, half in zip(outputs, map(from_channels, np.split(pixels, 2, axis=1))):
        if not output.exists():
            write_picture(output, half)
        elif not np.array_equal(read_picture(output).pixels, half.pixels):
            raise UserError(f"{output} already exists and is not a half of {path}: remove it.")


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the original distribution, or SPA-Data's list of pairs")
    parser.add_argument("destination", type=Path, help="where input/ and target/ go")
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking to them")
    parser.add_argument("--clean_half", choices=("left", "right"), help="split pictures that hold both side by side")
    args = parser.parse_args(argv)
    folders = args.destination / "input", args.destination / "target"
    if args.clean_half:
        problems, (paths, root) = [], find_pictures(args.source, folders)
        halves = folders[::-1] if args.clean_half == "left" else folders  # where the left and the right one go
        for path in tqdm(paths, unit="picture", disable=None):
            try:
                split_picture(path, [folder / path.relative_to(root).with_suffix(".png") for folder in halves])
            except UserError as error:
                problems.append(str(error))
        count = len(paths) - len(problems)
    else:
        if args.source.is_file():
            pairs, problems = pairs_of_list(args.source), []
        else:
            pairs, problems = pairs_by_layout(args.source, folders)
        if not pairs:
            raise UserError(
                f"{args.source} matches none of the layouts in Datasets/README.md: put rainy pictures into "
                f"{folders[0]} and clean ones of the same names into {folders[1]}."
            )
        place_pairs(pairs, folders, args.copy)
        count = len(pairs)
    print(f"{counted(count, 'pair')} in {args.destination}; `python -m utils.doctor {args.destination}` examines them")
    if problems:
        raise UserError(f"{counted(len(problems), 'picture')} left out:{listed(problems, 10)}")


if __name__ == "__main__":
    main()
