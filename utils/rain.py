"""Synthetic rain: pairs of rainy and clean pictures from clean photographs.

    python -m utils.rain photos/ Datasets/mine/train --versions 4

writes photos/NAME.* as target/NAME.png and its rainy versions as input/NAME_1.png, input/NAME_2.png, …
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.errors import UserError, reports_errors
from utils.images import find_pictures, read_image, write_png


def streak_kernel(length, width, angle):
    """The mark of one falling drop: a line of `length` × `width` pixels, `angle` degrees off the vertical, sum 1."""
    side = int(length) // 2 * 2 + 3
    kernel = np.zeros((side, side), np.float32)
    centre = np.array([side // 2, side // 2])
    half = length / 2 * np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])
    sixteenths = [tuple(round(16 * float(v)) for v in end) for end in (centre - half, centre + half)]
    cv2.line(kernel, *sixteenths, 1.0, thickness=1, lineType=cv2.LINE_AA, shift=4)
    kernel = cv2.GaussianBlur(kernel, (0, 0), width)
    return kernel / kernel.sum()


def rain_layer(height, width, rng):
    """One depth of rain as blurred noise -> H×W float32 opacity in [0, 1].

    Drawn from the NumPy generator `rng`: direction within ±35° of the vertical, length 9–45 pixels, width 0.4–1.1
    (standard deviation), density 0.1–0.8 % of the pixels start a streak, opacity 0.3–0.8.
    """
    angle, length = rng.uniform(-35, 35), rng.uniform(9, 45)
    kernel = streak_kernel(length, rng.uniform(0.4, 1.1), angle)
    density, opacity = rng.uniform(0.001, 0.008), rng.uniform(0.3, 0.8)
    drops = (rng.random((height, width)) < density) * rng.uniform(0.3, 1, (height, width))
    streaks = cv2.filter2D(drops.astype(np.float32), -1, kernel, borderType=cv2.BORDER_REFLECT)
    return np.clip(opacity * streaks / kernel.max(), 0, 1)


def add_rain(clean, rng):
    """H×W×3 uint8 -> the same picture in rain, likewise: one or two layers of streaks, screen-blended.

    `rng` is a NumPy generator; the same state gives the same rain.
    """
    through = np.ones(clean.shape[:2], np.float32)
    for _ in range(rng.integers(1, 3)):
        through *= 1 - 0.9 * rain_layer(*clean.shape[:2], rng)
    bright = rng.uniform(0.75, 0.95)  # streaks are a little darker than white
    rainy = clean * through[..., None] + np.maximum(clean, 255 * bright) * (1 - through[..., None])
    return np.round(rainy).astype(np.uint8)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", help="clean photographs: a folder, a picture or a 'pattern'")
    parser.add_argument("output", type=Path, help="where input/ and target/ go")
    parser.add_argument("--versions", type=int, default=1, help="rainy versions of each photograph (default: 1)")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)
    paths, root = find_pictures(args.clean)
    names = [str(path.relative_to(root).with_suffix("")) for path in paths]
    versions_of = {f"{name}_{version}": name for name in names for version in range(1, args.versions + 1)}
    for name in names:
        if name in versions_of or names.count(name) > 1:
            raise UserError(f"{name} in {root} would be mixed up with a picture of nearly the same name: rename it.")
    for number, (path, name) in enumerate(zip(tqdm(paths, unit="picture", disable=None), names)):
        clean = read_image(path)
        write_png(args.output / "target" / f"{name}.png", clean)
        for version in range(1, args.versions + 1):
            rng = np.random.default_rng((args.seed, number, version))
            write_png(args.output / "input" / f"{name}_{version}.png", add_rain(clean, rng))


if __name__ == "__main__":
    main()
