"""The visual comparison that papers print: a row of methods for each picture, with a zoomed crop and PSNR / SSIM."""

import argparse
import re
from typing import NamedTuple

import cv2
import numpy as np

from dataset_RGB import DATASETS, match_by_name
from evaluations.evaluate import pair_results
from evaluations.metrics import psnr_ssim
from evaluations.table import paper_scores
from utils.errors import UserError
from utils.files import atomic_write
from utils.images import find_pictures, holds_pictures, read_image

COLUMN = 1.5  # inches


class Choice(NamedTuple):
    """A picture of a data set, and the crop (x, y, width, height) to enlarge, or None."""

    dataset: str
    picture: str
    crop: tuple | None


def parse_choice(text):
    """ "Rain200L/norain-1x2@120,40,90,60" -> Choice; the crop may be left away."""
    found = re.fullmatch(r"([^/]+)/(.+?)(?:@(\d+),(\d+),(\d+),(\d+))?", text)
    if not found or found[1] not in DATASETS:
        raise argparse.ArgumentTypeError(
            f"{text} should read like Rain200L/norain-1x2 or Rain200L/norain-1x2@120,40,90,60"
        )
    return Choice(found[1], found[2], tuple(map(int, found.groups()[2:])) if found[3] else None)


def strongest_rain(rainy, clean):
    """The crop, a third of the shorter side wide, in which the two differ most -> x, y, width, height."""
    side = max(1, min(clean.shape[:2]) // 3)
    difference = np.abs(rainy.astype(np.float32) - clean).mean(axis=2)
    sums = cv2.boxFilter(difference, -1, (side, side), anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    sums = sums[: clean.shape[0] - side + 1, : clean.shape[1] - side + 1]
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    return int(x), int(y), side, side


def rainy_picture(choice, folder):
    """The path of the chosen rainy picture, named with or without its ending."""
    paths, root = find_pictures(folder)
    names = {str(path.relative_to(root).with_suffix("")): path for path in paths}
    names |= {str(path.relative_to(root)): path for path in paths}
    if choice.picture not in names:
        raise UserError(f"{folder} has no picture named {choice.picture}.")
    return names[choice.picture]


def result_of(rainy, target, results, targets):
    """The path of a method's result for a rainy picture, found as its results are measured; None if there is none."""
    paths = [pair.input for pair in pair_results(results, targets)[0] if pair.target == target]
    same_name = [path for path in paths if path.stem == rainy.stem]
    return (same_name or (paths if len(paths) == 1 else [None]))[0]


def collect(choice, data_dir, results_dir):
    """-> dict of "Rainy", methods and "Clean" -> picture, H×W×3 uint8. Methods without this picture are named."""
    test = data_dir / choice.dataset / "test"
    rainy = rainy_picture(choice, test / "input")
    clean_paths, clean_root = find_pictures(test / "target")
    pairs, problems = match_by_name([rainy], clean_paths, test / "input", clean_root)
    if not pairs:
        raise UserError(problems[0])
    clean = pairs[0].target
    known = list(dict.fromkeys(method for _, method in paper_scores()))
    methods = sorted(
        (folder.parent.name for folder in results_dir.glob(f"*/{choice.dataset}") if holds_pictures(folder)),
        key=lambda method: (known.index(method) if method in known else len(known), method),
    )
    paths = {"Rainy": rainy}
    for method in methods:
        paths[method] = result_of(rainy, clean, results_dir / method / choice.dataset, test / "target")
        if paths[method] is None:
            print(f"{method} has no picture of {choice.dataset}/{choice.picture}")
    paths["Clean"] = clean
    pictures = {name: read_image(path) for name, path in paths.items() if path}
    for method, picture in pictures.items():
        if picture.shape != pictures["Clean"].shape:
            raise UserError(f"{paths[method]} and {clean} are not of one size.")
    return pictures


def draw_comparison(choices, data_dir, results_dir):
    """Draws the chosen pictures by all methods, two rows each (whole, crop) -> matplotlib Figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = [(choice, collect(choice, data_dir, results_dir)) for choice in choices]
    columns = max(len(pictures) for _, pictures in rows)
    crops = [choice.crop or strongest_rain(pictures["Rainy"], pictures["Clean"]) for choice, pictures in rows]
    heights = []  # of the whole picture and of its crop, in units of a column's width
    for (choice, pictures), (x, y, width, height) in zip(rows, crops):
        rows_of_pixels, columns_of_pixels = pictures["Clean"].shape[:2]
        if width < 1 or height < 1 or x + width > columns_of_pixels or y + height > rows_of_pixels:
            raise UserError(f"the crop of {choice.dataset}/{choice.picture} does not lie inside the picture.")
        heights += [rows_of_pixels / columns_of_pixels, height / width + 0.3]
    figure = Figure(figsize=(COLUMN * columns, COLUMN * sum(heights)), layout=None)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights, wspace=0.04, hspace=0.02)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.995, bottom=0.005)
    for index, ((choice, pictures), (x, y, width, height)) in enumerate(zip(rows, crops)):
        for column, (name, picture) in enumerate(pictures.items()):
            whole = figure.add_subplot(grid[2 * index, column])
            whole.imshow(picture, interpolation="nearest")
            whole.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="red", linewidth=1))
            zoom = figure.add_subplot(grid[2 * index + 1, column], anchor="N")
            zoom.imshow(picture[y : y + height, x : x + width], interpolation="nearest")
            scores = "PSNR / SSIM"
            if name != "Clean":
                scores = "{:.2f} / {:.4f}".format(
                    *psnr_ssim(picture, pictures["Clean"], DATASETS[choice.dataset].protocol)
                )
            zoom.set_xlabel(f"{name}\n{scores}", fontsize=7, labelpad=2)
            for axes in (whole, zoom):
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
    return figure


def write_comparison(choices, data_dir, results_dir, path):
    """Draws the chosen pictures by all methods, and writes `path`.png and `path`.pdf."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("--figure needs matplotlib: pip install matplotlib.") from None
    figure = draw_comparison(choices, data_dir, results_dir)
    with rc_context({"pdf.fonttype": 42}):  # text that journals accept
        for ending in ("png", "pdf"):
            with atomic_write(f"{path}.{ending}") as file:
                figure.savefig(file, format=ending, dpi=250)
