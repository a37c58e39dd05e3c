import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from evaluations.metrics import PROTOCOLS, downsample, luma, other_conventions, psnr, psnr_ssim, ssim
from tests.golden import METRICS, generator


def enlarge(grid, height, width):
    """Bilinear with corners aligned."""
    for size in (height, width):
        position = np.linspace(0, len(grid) - 1, size)
        lower = np.minimum(position.astype(int), len(grid) - 2)
        weight = (position - lower)[:, None, None]
        grid = (grid[lower] * (1 - weight) + grid[lower + 1] * weight).swapaxes(0, 1)
    return grid


def reference_pictures(size):
    """-> result and target of the reference numbers, H×W×3 uint8."""
    height, width = map(int, size.split("x"))
    shape = max(2, height // 16), max(2, width // 16), 3
    base = generator(f"metric{size}/base").random_sample(shape).astype(np.float32).astype(float)
    noise = generator(f"metric{size}/noise").random_sample((height, width, 3)).astype(np.float32).astype(float)
    target = enlarge(base, height, width)
    return [np.floor(255 * np.clip(p, 0, 1) + 0.5).astype(np.uint8) for p in (target + (noise - 0.5) * 0.15, target)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", METRICS)
def test_metrics_are_those_of_the_matlab_scripts(size, protocol):
    decibels, similarity = psnr_ssim(*reference_pictures(size), protocol)
    expected = METRICS[size][protocol]
    psnr_tolerance, ssim_tolerance = {"rain200": (2e-6, 2e-7), "did": (1e-9, 1e-9)}[protocol]
    assert decibels == pytest.approx(expected["psnr"], rel=0, abs=psnr_tolerance)
    assert similarity == pytest.approx(expected["ssim"], rel=0, abs=ssim_tolerance)


def test_scikit_image_agrees_where_its_definition_does():
    x, y = reference_pictures("64x48")
    x_luma, y_luma, others = luma(x, rounded=True), luma(y, rounded=True), other_conventions(x, y)
    assert psnr_ssim(x, y, "rain200")[0] == pytest.approx(peak_signal_noise_ratio(y_luma, x_luma, data_range=255))
    assert others["psnr_rgb"] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=255))
    assert others["psnr_y_unrounded"] == pytest.approx(METRICS["64x48"]["did"]["psnr"], abs=1e-9)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "full": True}
    _, full = structural_similarity(x_luma, y_luma, **options)
    assert ssim(x_luma, y_luma) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)
    _, full = structural_similarity(x / 1.0, y / 1.0, channel_axis=2, **options)
    assert others["ssim_rgb"] == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # such as NumPy's of a division by 0
def test_identical_pictures_are_perfect():
    x = reference_pictures("64x48")[0]
    for protocol in PROTOCOLS:
        assert psnr_ssim(x, x.copy(), protocol) == (math.inf, pytest.approx(1, abs=1e-12))
    assert other_conventions(x, x)["psnr_rgb"] == math.inf and other_conventions(x, x)["ssim_rgb"] == pytest.approx(1)


@pytest.mark.parametrize("side, factor", [(255, 1), (383, 1), (384, 2), (639, 2), (640, 3)])
def test_downsampling_starts_half_way_between_multiples_of_256(side, factor):
    small = downsample(np.zeros((side, side + 40)))
    assert small.shape == (math.ceil(side / factor), math.ceil((side + 40) / factor))


def test_what_cannot_be_measured_is_not_a_number():
    x = np.zeros((10, 30, 3), np.uint8)  # too small for SSIM's window
    assert math.isnan(psnr_ssim(x, x + 1, "rain200")[1]) and math.isnan(psnr(math.nan, 1))


@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 1), (20, 20, 4), (0, 20, 3)])
def test_wrong_arguments_are_refused(shape):
    wrong, right = np.zeros(shape, np.uint8), np.zeros((20, 20, 3), np.uint8)
    for result, target, protocol, message in (
        (wrong, wrong, "did", "H×W×3"),
        (right, right[1:], "did", "one size"),
        (right, right / 1.0, "did", "uint8"),
        (right, right, "y", "protocol"),
    ):
        with pytest.raises(ValueError, match=message):
            psnr_ssim(result, target, protocol)
