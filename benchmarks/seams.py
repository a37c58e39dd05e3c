"""Seams: how much steeper results are where windows or tiles meet than elsewhere.

python -m benchmarks.seams                                  # the demo's rainy pictures
python -m benchmarks.seams photo.jpg --weights model_best.pth

A picture's own edges are far steeper than a seam. So the picture derained whole is subtracted: what is left changes
smoothly but for seams. Steps are mean absolute differences of neighbouring pixels, in levels of 255. The last column
sets the steps of the derained pictures where windows or tiles meet against those at the same places of the whole ones.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.common import report
from utils.checkpoint import OWN_WEIGHTS, load_network, network_name
from utils.devices import add_gpus, choose_device
from utils.images import find_pictures, read_image
from utils.inference import Derainer, tile_spans, window_spans

PICTURES = "Datasets/demo/test/input"


def meeting_places(mode, side, window):
    """-> boolean array over the steps between `side` pixels: where windows meet, or tiles overlap."""
    size = min(window, side)
    spans = window_spans(side, size) if mode == "window" else tile_spans(side, size, size // 8)
    used = np.array([np.bincount(start + np.flatnonzero(weights), minlength=side) for start, weights in spans])
    if mode == "window":
        return np.diff(used.argmax(axis=0)) != 0
    shared = used.sum(axis=0) > 1
    return shared[1:] | shared[:-1]


def steps(difference, mode, window):
    """H×W×3 -> mean step where windows or tiles meet, and elsewhere."""
    there, elsewhere = [], []
    for axis in (0, 1):
        change = np.abs(np.diff(difference, axis=axis)).mean(axis=(1 - axis, 2))
        meets = meeting_places(mode, difference.shape[axis], window)
        there.append(change[meets])
        elsewhere.append(change[~meets])
    return float(np.concatenate(there).mean()), float(np.concatenate(elsewhere).mean())


def compare(net, pictures, window):
    """-> rows of the table."""
    rows = []
    whole = [Derainer(net, "whole")(picture).astype(np.float32) for picture in pictures]
    for mode in ("window", "tile"):
        derain = Derainer(net, mode, window)
        results = list(map(derain, pictures))
        (there, elsewhere), (seen, _), (without, _) = (
            255 * np.mean([steps(image, mode, window) for image in images], axis=0)
            for images in (map(np.subtract, results, whole), results, whole)
        )
        rows.append(
            {
                "mode": mode,
                "steps where they meet": float(there),
                "elsewhere": float(elsewhere),
                "ratio": float(there / elsewhere),
                "against whole": float(seen / without),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", default=PICTURES, help="a picture, folder or pattern")
    parser.add_argument("--weights", type=Path, default=OWN_WEIGHTS, help="a checkpoint (default: this repository's)")
    parser.add_argument("--win_size", type=int, default=128, help="side of windows and tiles (default: %(default)s)")
    add_gpus(parser)
    args = parser.parse_args()
    device = choose_device(args.gpus)
    net = load_network(args.weights).to(device)
    pictures = [read_image(path).astype(np.float32) / 255 for path in find_pictures(args.pictures)[0]]
    rows = compare(net, pictures, args.win_size)
    demo = args == parser.parse_args([])
    report("seams", rows, device, demo, network=network_name(net), pictures=len(pictures), window=args.win_size)


if __name__ == "__main__":
    main()
