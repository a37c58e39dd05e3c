"""What the definitions of PSNR and SSIM amount to: the rain in the same pictures, measured in five ways.

python -m benchmarks.protocols Datasets/Rain12/test
python -m benchmarks.protocols Datasets/Rain800/train --smallest 384       # where `did` halves the pictures
"""

import argparse

import cv2
import numpy as np
from skimage.metrics import structural_similarity
from tqdm import tqdm

from dataset_RGB import find_pairs
from evaluations.metrics import other_conventions, psnr, psnr_ssim


def opencv_luma(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., 0]


def measure(rainy, clean):
    """Two H×W×3 uint8 pictures -> dict of a definition's name -> PSNR in dB, SSIM."""
    rgb = other_conventions(rainy, clean)
    y, y_clean = opencv_luma(rainy), opencv_luma(clean)
    return {
        "rain200": psnr_ssim(rainy, clean, "rain200"),
        "did": psnr_ssim(rainy, clean, "did"),
        "RGB, same SSIM": (rgb["psnr_rgb"], rgb["ssim_rgb"]),
        "OpenCV's Y, scikit-image's default SSIM": (
            psnr(np.mean((y.astype(float) - y_clean) ** 2), peak=255),
            structural_similarity(y, y_clean),
        ),
        "RGB, scikit-image's default SSIM": (
            rgb["psnr_rgb"],
            structural_similarity(rainy, clean, channel_axis=2),
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with input/ and target/")
    parser.add_argument("--clean_half", choices=("left", "right"), help="pictures hold both halves side by side")
    parser.add_argument(
        "--smallest", type=int, default=0, help="leave out pictures with a shorter side (default: none)"
    )
    args = parser.parse_args()
    found = []
    for pair in tqdm(find_pairs(args.root, args.clean_half), unit="pair", disable=None):
        rainy, clean = (np.ascontiguousarray(image) for image in pair.read())
        if min(clean.shape[:2]) >= args.smallest:
            found.append(measure(rainy, clean))
    print(f"| {len(found)} pictures of {args.root} | PSNR | SSIM |\n|---|---|---|")
    for name in found[0]:
        decibels, similarity = np.mean([measured[name] for measured in found], axis=0)
        print(f"| {name} | {decibels:.3f} | {similarity:.4f} |")


if __name__ == "__main__":
    main()
