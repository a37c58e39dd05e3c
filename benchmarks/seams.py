"""Seams: why photographs are derained by tiles and not by the published windows.

python -m benchmarks.seams                  # the demo's rainy photographs
python -m benchmarks.seams photo.jpg

Each picture is also derained whole. A result minus the whole one has no edges of the picture, only seams: the table
shows the mean step, in levels of 255, across the row or column of pixels where it is largest, and across a typical one.
"""

import argparse

import numpy as np

from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import Derainer
from utils.devices import add_gpus, choose_device
from utils.pictures import find_pictures, read_image


def steps(difference):
    """H×W×3 -> for each boundary between two rows and two columns, the mean absolute step across it."""
    return np.concatenate([np.abs(np.diff(difference, axis=axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1)])


def compare(net, pictures, window):
    """Pictures H×W×3 float32 in [0, 1] -> dict of mode -> the largest and the median step, mean over the pictures."""
    whole, found = [Derainer(net, "whole")(picture) for picture in pictures], {}
    for mode in ("window", "tile"):
        derain = Derainer(net, mode, window)
        found_steps = [255 * steps(derain(picture) - result) for picture, result in zip(pictures, whole)]
        found[mode] = (np.mean([values.max() for values in found_steps]), np.mean(list(map(np.median, found_steps))))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", default="Datasets/demo/test/input", help="a picture, folder or pattern")
    parser.add_argument("--weights", default=OWN_WEIGHTS, help="a checkpoint (default: this repository's own)")
    parser.add_argument("--win_size", type=int, default=128, help="side of windows and tiles (default: %(default)s)")
    add_gpus(parser)
    args = parser.parse_args(argv)
    net = load_network(args.weights).to(choose_device(args.gpus))
    pictures = [read_image(path).astype(np.float32) / 255 for path in find_pictures(args.pictures)[0]]
    print("| mode | largest step | typical step |\n|---|---|---|")
    for mode, (largest, typical) in compare(net, pictures, args.win_size).items():
        print(f"| {mode} | {largest:.2f} | {typical:.2f} |")


if __name__ == "__main__":
    main()
