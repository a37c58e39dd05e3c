"""PSNR and SSIM as the paper's tables measure them: two MATLAB protocols, which give different numbers.

"rain200" (Rain200L, Rain200H, SPA-Data): 8-bit luma, rounded to integers; SSIM at full size.
"did" (DID-Data, DDN-Data): luma in double precision; SSIM after automatic downsampling to about 256 pixels.
SSIM: Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
"""

import math

import cv2
import numpy as np

PROTOCOLS = ("rain200", "did")


def psnr(mse, peak):
    """Peak signal-to-noise ratio in dB; infinite for identical pictures."""
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def luma(image, rounded):
    """BT.601 studio-swing Y in [16, 235] of H×W×3 uint8 RGB -> H×W float64; exact integers where rounded (half up)."""
    red, green, blue = np.moveaxis(image.astype(np.int64), 2, 0)
    weighted = 65481 * red + 128553 * green + 24966 * blue
    if rounded:
        return ((2 * weighted + 255000) // 510000 + 16).astype(np.float64)
    return 16 + weighted / 255000


def downsample(image):
    """Averages f×f pixels and keeps every f-th, f = the shorter side / 256 rounded half up, at least 1."""
    factor = max(1, math.floor(min(image.shape) / 256 + 0.5))
    anchor = ((factor - 1) // 2, (factor - 1) // 2)  # MATLAB's imfilter: the lower-index centre of an even window
    smooth = cv2.boxFilter(image, cv2.CV_64F, (factor, factor), anchor=anchor, borderType=cv2.BORDER_REFLECT)
    return smooth[::factor, ::factor]


def ssim(x, y):
    """Mean structural similarity of two H×W float64 pictures in [0, 255]: 11×11 Gaussian window of σ 1.5, only where
    it lies inside the picture. NaN where a side is under 11 pixels."""
    if min(x.shape) < 11:
        return math.nan

    def blur(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def check(result, target):
    """Raises ValueError unless these are two H×W×3 uint8 pictures of one size."""
    fits = result.shape == target.shape and result.shape[2:] == (3,) and result.size
    if not fits or result.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(
            "the two pictures must be H×W×3 uint8 arrays of one size, "
            f"not {result.shape} {result.dtype} and {target.shape} {target.dtype}"
        )


def psnr_ssim(result, target, protocol):
    """PSNR in dB and SSIM of two H×W×3 uint8 RGB pictures under the protocol "rain200" or "did".

    Identical pictures have infinite PSNR; pictures with a side under 11 pixels (after downsampling) have SSIM NaN.
    Raises ValueError for anything else than two such pictures of one size.
    """
    check(result, target)
    if protocol not in PROTOCOLS:
        raise ValueError(f"the protocol must be one of {PROTOCOLS}, not {protocol!r}")
    x, y = (luma(image, rounded=protocol == "rain200") for image in (result, target))
    decibels = psnr(np.mean((x - y) ** 2), peak=255)
    if protocol == "did":
        x, y = downsample(x), downsample(y)
    return decibels, ssim(x, y)


def other_conventions(result, target):
    """What other papers print under the same names, which cannot be compared with the two protocols -> dict:

    "psnr_y_unrounded": PSNR of the luma before rounding; "psnr_rgb": PSNR over all three channels; "ssim_rgb": the mean
    of the channels' SSIM at full size.
    """
    check(result, target)
    unrounded = luma(result, rounded=False) - luma(target, rounded=False)
    x, y = result.astype(np.float64), target.astype(np.float64)
    return {
        "psnr_y_unrounded": psnr(np.mean(unrounded**2), peak=255),
        "psnr_rgb": psnr(np.mean((x - y) ** 2), peak=255),
        "ssim_rgb": float(np.mean([ssim(x[..., channel], y[..., channel]) for channel in range(3)])),
    }
