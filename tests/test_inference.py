import numpy as np
import pytest
import torch

from model import MultiscaleNet
from tests.golden import ARRAYS, golden_input, golden_network
from utils.images import to_image
from utils.inference import derain, derain_windows, spans


@pytest.fixture(scope="module")
def reference_net():
    return golden_network("nerd_rain_s").to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def narrow_net():
    torch.manual_seed(0)
    return MultiscaleNet(dim=8, num_blocks=(1, 1, 1))


@pytest.mark.parametrize("key", [key for key in ARRAYS if key.startswith("window64/")])
def test_windows_give_the_published_pictures(reference_net, key):
    size = key.partition("/")[2]
    height, width = map(int, size.split("x"))
    result = to_image(derain_windows(reference_net, golden_input(f"window{size}", 1, 3, height, width)[0], window=64))
    difference = np.abs(result.astype(int) - ARRAYS[key])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-4


def test_windows_cover_every_pixel_once():
    for side in range(1, 200):
        for window in (16, 48):
            if side < window:
                continue
            used = [pixel for start, first in spans(side, window) for pixel in range(first, start + window)]
            assert used == list(range(side))
            assert all(start + window <= side for start, _ in spans(side, window))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3), (16, 16), (31, 33), (64, 20), (70, 100)])
def test_any_size_is_derained(narrow_net, size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    result = derain(narrow_net, image, window=32)
    assert result.shape == image.shape and result.dtype == np.uint8
    assert np.array_equal(result, derain(narrow_net, image, window=32))


def test_a_short_side_is_reflected_to_a_multiple_of_16(narrow_net):
    image = np.random.default_rng(0).integers(0, 255, (20, 48, 3), dtype=np.uint8)
    padded = np.concatenate([image, image[18:6:-1]])  # 32 rows
    assert np.array_equal(derain(narrow_net, image, window=64), derain(narrow_net, padded, window=64)[:20])


@pytest.mark.parametrize("window", [0, -16, 100])
def test_windows_must_fit_the_network(narrow_net, window):
    with pytest.raises(ValueError, match="multiple of 16"):
        derain(narrow_net, np.zeros((32, 32, 3), np.uint8), window)


def test_bfloat16_gives_nearly_the_same_picture():
    net = golden_network("nerd_rain_s")
    image = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    exact, fast = (derain(net, image, window=48, bf16=bf16).astype(int) for bf16 in (False, True))
    assert 0 < np.abs(exact - fast).mean() < 2
