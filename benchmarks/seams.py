"""Seams: why photographs are derained by tiles and not by the published windows.

python -m benchmarks.seams                  # the demo's rainy photographs
python -m benchmarks.seams photo.jpg

Each picture is also derained whole. A result minus the whole one has no edges of the picture, only seams: the table
shows the mean step, in levels of 255, across the row or column of pixels where it is largest, and across a typical one.
"""

import argparse

import numpy as np

from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import WINDOW, Derainer
from utils.devices import add_gpus, choose_device
from utils.files import reports_errors
from utils.pictures import find_pictures, read_image


def largest_and_typical_step(difference):
    """H×W×3 -> of the mean absolute steps between two rows or two columns, the largest and the median."""
    steps = np.concatenate([np.abs(np.diff(difference, axis=axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1)])
    return steps.max(), np.median(steps)


def compare(net, pictures, window=WINDOW):
    """Pictures H×W×3 float32 in [0, 1] -> dict of mode -> the largest and the median step, mean over the pictures."""
    whole, modes = Derainer(net, "whole"), {mode: Derainer(net, mode, window) for mode in ("window", "tile")}
    found = {mode: [] for mode in modes}
    for picture in pictures:
        expected = whole(picture)
        for mode, derain in modes.items():
            found[mode].append(largest_and_typical_step(255 * (derain(picture) - expected)))
    return {mode: np.mean(steps, axis=0) for mode, steps in found.items()}


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", default="Datasets/demo/test/input", help="a picture, folder or pattern")
    add_gpus(parser)
    args = parser.parse_args(argv)
    net = load_network(OWN_WEIGHTS).to(choose_device(args.gpus))
    pictures = [read_image(path).astype(np.float32) / 255 for path in find_pictures(args.pictures)[0]]
    print("| mode | largest step | typical step |\n|---|---|---|")
    for mode, (largest, typical) in compare(net, pictures).items():
        print(f"| {mode} | {largest:.2f} | {typical:.2f} |")


if __name__ == "__main__":
    main()
