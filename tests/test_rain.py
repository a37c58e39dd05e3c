import numpy as np
import pytest

from dataset_RGB import find_pairs
from utils import rain
from utils.images import read_image, write_png
from utils.rain import add_rain, rain_layer, streak_kernel

GREY = np.full((120, 160, 3), 90, np.uint8)


def test_a_seed_gives_one_rain_and_another_gives_another():
    first, again, other = (add_rain(GREY, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("seed", range(8))
def test_rain_is_visible_and_only_brightens(seed):
    rainy = add_rain(GREY, np.random.default_rng(seed))
    assert rainy.shape == GREY.shape and rainy.dtype == np.uint8
    assert (rainy >= GREY).all()
    brighter = (rainy > GREY + 10).mean()
    assert 0.01 < brighter < 0.98


@pytest.mark.parametrize("seed", range(8))
def test_a_layer_is_an_opacity(seed):
    layer = rain_layer(60, 80, np.random.default_rng(seed))
    assert layer.shape == (60, 80) and layer.min() >= 0 and 0.1 < layer.max() <= 1


@pytest.mark.parametrize("angle", [-30, 0, 20])
def test_streaks_have_their_direction_and_length(angle):
    kernel = streak_kernel(31, 0.7, angle)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]] - kernel.shape[0] // 2
    moments = np.array([[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)])
    variances, directions = np.linalg.eigh(moments)
    found = np.degrees(np.arctan2(directions[0, 1], directions[1, 1]))
    assert (found - angle + 90) % 180 - 90 == pytest.approx(0, abs=2)
    assert np.sqrt(12 * variances[1]) == pytest.approx(31, rel=0.15)


@pytest.mark.parametrize("names", [("IMG.png", "IMG_1.png"), ("a.png", "a.bmp")])
def test_names_that_would_be_mixed_up_are_refused(tmp_path, names):
    for name in names:
        write_png(tmp_path / "photos" / name, GREY)
    with pytest.raises(SystemExit, match="mixed up"):
        rain.main([str(tmp_path / "photos"), str(tmp_path / "set"), "--versions", "2"])
    assert not (tmp_path / "set").exists()


def test_the_command_writes_pairs_that_train(tmp_path):
    for name in ("a", "sub/b"):
        write_png(tmp_path / "photos" / f"{name}.png", GREY)
    rain.main([str(tmp_path / "photos"), str(tmp_path / "set"), "--versions", "3"])
    pairs = find_pairs(tmp_path / "set")
    assert len(pairs) == 6
    assert len({read_image(pair.input).tobytes() for pair in pairs}) == 6
    assert all(np.array_equal(read_image(pair.target), GREY) for pair in pairs)
