"""Synthetic rain: pairs of rainy and clean pictures from clean photographs.

    python -m utils.rain photos/ Datasets/mine/train --versions 4

writes photos/NAME.* as target/NAME.png and its rainy versions as input/NAME_1.png, input/NAME_2.png, …
train.py --clean_dir makes them while it trains, new ones in every epoch.

A rainy picture is the clean one in other light, behind a veil of distant drops, behind layers of streaks from far to
near, as a camera with noise and JPEG compression records it. STYLES gives the ranges of its parameters.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from utils.files import UserError, listed, reports_errors
from utils.pictures import find_pictures, read_image, write_png


class Style(NamedTuple):
    """How a kind of rain is drawn: each parameter uniformly between (lowest, highest), or so in its logarithm."""

    share: float  # of the pictures
    layers: tuple  # number of layers of streaks
    tilt: tuple  # direction of all layers, degrees off the vertical, to either side
    spread: tuple  # how far a layer's direction lies from that, degrees to either side
    length: tuple  # of a streak in pixels; logarithmic
    width: tuple  # standard deviation across a streak in pixels: a sharp drop to a defocused one; logarithmic
    density: tuple  # part of the pixels in which a streak is centred; logarithmic
    opacity: tuple  # of a layer's strongest streaks
    brightness: tuple  # of the streaks, 1 being white
    veil: tuple = (0, 0)  # how much of the farthest part of the scene is lost in haze
    contrast: tuple = (1, 1)  # of the scene in the light of a rainy day, about mid-grey
    exposure: tuple = (0, 0)  # how much brighter that light is, in levels of 255


STYLES = {
    "light": Style(  # fine streaks in one direction: Rain12, Rain100L, Rain200L
        share=0.25,
        layers=(1, 2),
        tilt=(0, 30),
        spread=(0, 2),
        length=(6, 45),
        width=(0.35, 0.9),
        density=(1e-3, 1e-2),
        opacity=(0.15, 0.8),
        brightness=(0.6, 1),
    ),
    "heavy": Style(  # long, dense, nearly opaque streaks in several directions: Rain100H, Rain200H
        share=0.4,
        layers=(3, 5),
        tilt=(0, 15),
        spread=(0, 20),
        length=(25, 70),
        width=(0.5, 1),
        density=(5.5e-3, 1.4e-2),
        opacity=(0.3, 0.8),
        brightness=(0.8, 1),
    ),
    "shower": Style(  # thick showers of short streaks, in another light: Rain800, DID-Data, DDN-Data
        share=0.25,
        layers=(1, 3),
        tilt=(0, 40),
        spread=(0, 8),
        length=(8, 40),
        width=(0.4, 1.2),
        density=(2e-3, 1.4e-2),
        opacity=(0.2, 0.6),
        brightness=(0.7, 1),
        contrast=(0.8, 1.12),
        exposure=(-20, 20),
    ),
    "deep": Style(  # all depths at once, from haze to defocused drops before the lens: photographs of real rain
        share=0.1,
        layers=(3, 5),
        tilt=(0, 25),
        spread=(0, 5),
        length=(4, 70),
        width=(0.35, 2),
        density=(2e-3, 2e-2),
        opacity=(0.05, 0.35),
        brightness=(0.6, 0.95),
        veil=(0, 0.5),
    ),
}
ANY_SIDE = 0.3  # of the pictures have rain that falls from any side: results must not depend on what is up


def streak_kernel(length, width, angle):
    """The mark of one falling drop: a line of `length` × `width` pixels, `angle` degrees off the vertical, peak 1."""
    side = 2 * int(np.ceil(length / 2 + 3 * width)) + 1
    y, x = np.mgrid[:side, :side].astype(np.float32) - side // 2
    sine, cosine = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    along, across = np.abs(x * sine + y * cosine), x * cosine - y * sine
    beyond = np.maximum(along - length / 2, 0)  # the ends are as soft as the sides
    return np.exp(-(across**2 + beyond**2) / (2 * width**2)).astype(np.float32)


def between(bounds, part):
    """The value that lies `part` (0 to 1) of the way between two bounds, in their logarithms."""
    return float(np.exp(np.log(bounds[0]) + part * np.log(bounds[1] / bounds[0])))


def streaks(height, width, style, direction, rng):
    """One depth of rain -> H×W float32 opacity in [0, 1]. Near drops are long, wide and few. They are of three lengths
    and directions, a little apart, and each of a brightness of its own."""
    nearness = rng.random()
    length = between(style.length, nearness)
    thickness = between(style.width, np.clip(nearness + rng.normal(0, 0.25), 0, 1))
    density = between(style.density, rng.random()) / max(1, length * thickness / 15)
    margin = int(np.ceil(length))
    layer = np.zeros((height + 2 * margin, width + 2 * margin), np.float32)
    for _ in range(3):
        drops = (rng.random(layer.shape, np.float32) < density / 3) * rng.random(layer.shape, np.float32)
        kernel = streak_kernel(length * rng.uniform(0.7, 1.3), thickness, direction + rng.normal(0, 1.5))
        layer += cv2.filter2D(drops, -1, kernel)
    return np.clip(layer[margin : margin + height, margin : margin + width], 0, 1) * rng.uniform(*style.opacity)


def haze(height, width, strength, rng):
    """A veil that is thickest far away, which is mostly up in a picture -> H×W float32 opacity in [0, strength]."""
    depth = np.linspace(1, 0, 4)[:, None] * rng.uniform(0, 1) + rng.random((4, 4))
    depth = cv2.resize(depth.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(depth / 2, 0, 1) * strength


def camera(picture, rng):
    """Sensor noise (a third of the pictures, σ up to 5 levels) and JPEG artefacts (a third, quality 60 to 95)."""
    if rng.random() < 1 / 3:
        picture = picture + rng.normal(0, rng.uniform(0.5, 5), picture.shape)
    picture = np.clip(np.round(picture), 0, 255).astype(np.uint8)
    if rng.random() < 1 / 3:
        encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))])[1]
        picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return picture


def add_rain(clean, rng, style=None):
    """H×W×3 uint8 -> the same picture in rain, likewise. `style` is one of STYLES; None draws one by their shares.

    `rng` is a NumPy generator; the same state gives the same rain.
    """
    names, shares = list(STYLES), [style.share for style in STYLES.values()]
    style = STYLES[style or names[rng.choice(len(names), p=shares)]]
    height, width = clean.shape[:2]
    picture = 128 + rng.uniform(*style.contrast) * (clean.astype(np.float32) - 128) + rng.uniform(*style.exposure)
    picture = np.clip(picture, 0, 255)
    veil = haze(height, width, rng.uniform(*style.veil), rng)[..., None]
    light = 255 * rng.uniform(*style.brightness)
    picture += veil * (light - picture)
    direction = rng.choice((-1, 1)) * rng.uniform(*style.tilt)
    if rng.random() < ANY_SIDE:
        direction = rng.uniform(-90, 90)
    additive = rng.random() < 0.5
    for _ in range(rng.integers(style.layers[0], style.layers[1] + 1)):
        angle = direction + rng.choice((-1, 1)) * rng.uniform(*style.spread)
        layer = streaks(height, width, style, angle, rng)[..., None]
        if additive:  # as drops that only add light
            picture += layer * light
        else:  # as drops that hide what is behind them and are never darker than it
            picture += layer * np.maximum(light - picture, 0)
    return camera(picture, rng)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", help="clean photographs: a folder, a picture or a 'pattern'")
    parser.add_argument("output", type=Path, help="where input/ and target/ go")
    parser.add_argument("--versions", type=int, default=1, help="rainy versions of each photograph (default: 1)")
    parser.add_argument("--style", choices=STYLES, help="one kind of rain (default: all, by their shares)")
    parser.add_argument("--seed", type=int, default=1234, help="of the rain (default: 1234)")
    args = parser.parse_args(argv)
    if args.versions < 1 or args.seed < 0:
        parser.error("--versions must be at least 1, and --seed at least 0")
    targets, inputs = args.output / "target", args.output / "input"
    paths, root = find_pictures(args.clean, [targets, inputs])
    if any(root.resolve().is_relative_to(folder.resolve()) for folder in (targets, inputs)):
        raise UserError(f"results written into {root} might overwrite your pictures: choose another output.")
    names = [str(path.relative_to(root).with_suffix("")) for path in paths]
    versions = range(1, args.versions + 1)
    rainy_names = {f"{name}_{version}" for name in names for version in versions}
    for name, count in Counter(names).items():
        if name in rainy_names or count > 1:
            raise UserError(f"{name} in {root} would be mixed up with a picture of nearly the same name: rename it.")
    problems = []
    for number, path in enumerate(tqdm(paths, unit="picture", disable=None)):
        try:
            clean = read_image(path)
        except UserError as error:
            problems.append(str(error))
            continue
        write_png(targets / f"{names[number]}.png", clean)
        for version in versions:
            rng = np.random.default_rng((args.seed, number, version))
            write_png(inputs / f"{names[number]}_{version}.png", add_rain(clean, rng, args.style))
    if problems:
        raise UserError(f"{len(problems)} of {len(paths)} pictures failed:{listed(problems)}")


if __name__ == "__main__":
    main()
