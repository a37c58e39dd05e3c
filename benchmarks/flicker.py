"""Flicker between the derained frames of a clip: photographs in rain that is another one in every frame.

python -m benchmarks.flicker
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from benchmarks.common import report
from evaluations.metrics import psnr
from utils.checkpoint import OWN_WEIGHTS, load_network, network_name
from utils.devices import add_gpus, choose_device
from utils.images import read_image
from utils.inference import Derainer
from utils.rain import STYLES, streaks
from utils.video import steadied

SMOOTH, STILL = 8, 4  # pixels, which no streak survives, and levels
FRAMES, SIDE = 12, 256
PHOTOS = Path("Datasets/demo/test/target")


def flicker(rainy, frames):
    """Mean absolute change between successive frames, both N×H×W×3 in levels of 255, wherever nothing moves: where the
    rainy ones, smoothed until the rain is gone, hardly change."""
    smooth = np.stack([cv2.GaussianBlur(frame.astype(np.float32), (0, 0), SMOOTH) for frame in rainy])
    still = np.abs(np.diff(smooth, axis=0)).max(axis=3) < STILL
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0))[still].mean())


def scenes():
    """-> dict of name -> N×256×256×3 clean frames and the style of their rain."""
    woman, cat = (read_image(PHOTOS / name) for name in ("astronaut.png", "chelsea.png"))
    passing = np.stack([woman[:SIDE, :SIDE]] * FRAMES)
    for number, frame in enumerate(passing):
        frame[100:164, 10 + 8 * number : 74 + 8 * number] = cat[60:124, 60:124]
    return {
        "still, light rain": (np.stack([woman[:SIDE, :SIDE]] * FRAMES), "light"),
        "still, heavy rain": (np.stack([cat[:SIDE, :SIDE]] * FRAMES), "heavy"),
        "something passes": (passing, "light"),
        "camera pans": (np.stack([woman[n : n + SIDE, 2 * n : 2 * n + SIDE] for n in range(FRAMES)]), "light"),
    }


def rain_on(clean, style, rng):
    """One frame in fresh rain, which falls as it did in the other frames, with sensor noise."""
    picture = clean.astype(np.float32)
    for angle in (10, 15):
        picture += streaks(*clean.shape[:2], STYLES[style], angle, rng)[..., None] * np.maximum(240 - picture, 0)
    return np.clip(np.round(picture + rng.normal(0, 2, picture.shape)), 0, 255).astype(np.uint8)


def mean_psnr(frames, clean):
    """Mean RGB PSNR in dB of N×H×W×3 frames in levels of 255."""
    errors = np.mean((frames.astype(float) - clean) ** 2, axis=(1, 2, 3))
    return float(np.mean([psnr(error, peak=255) for error in errors]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=OWN_WEIGHTS, help="(default: this repository's own)")
    add_gpus(parser)
    args = parser.parse_args()
    device = choose_device(args.gpus)
    net = load_network(args.weights).to(device)
    rows = []
    for name, (clean, style) in scenes().items():
        rng = np.random.default_rng(0)
        rainy = np.stack([rain_on(frame, style, rng) for frame in clean])
        derained = np.stack([frame for _, frame in Derainer(net).pictures(enumerate(rainy))])
        steady = np.stack([frame for _, frame in steadied(enumerate(derained))])
        removed = rainy.astype(int) - derained
        layers = {"clean": clean, "rainy": rainy, "removed": removed, "derained": derained, "steady": steady}
        changes = {f"change, {layer}": flicker(rainy, frames) for layer, frames in layers.items()}
        qualities = {f"PSNR, {layer}": mean_psnr(layers[layer], clean) for layer in ("rainy", "derained", "steady")}
        rows.append({"clip": name, **changes, **qualities})
        print(rows[-1], flush=True)
    report("flicker", rows, device, args.weights == OWN_WEIGHTS, network=network_name(net), frames=FRAMES)


if __name__ == "__main__":
    main()
