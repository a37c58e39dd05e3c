import numpy as np
import pytest

from evaluations.metrics import psnr_ssim
from tests.conftest import ROOT, failure
from utils import rain
from utils.pairs import find_pairs
from utils.pictures import find_pictures, read_image, write_png
from utils.rain import STYLES, add_rain, haze, streak_kernel, streaks

GREY = np.full((120, 160, 3), 90, np.uint8)


def rain_on(picture, seed, style=None):
    return add_rain(picture, np.random.default_rng(seed), style)


def test_a_seed_gives_one_rain_and_another_gives_another():
    for style in (None, *STYLES):
        assert np.array_equal(rain_on(GREY, 1, style), rain_on(GREY, 1, style))
        assert not np.array_equal(rain_on(GREY, 1, style), rain_on(GREY, 2, style))


@pytest.mark.parametrize("style, psnr, ssim", [("light", 28.5, 0.84), ("shower", 23, 0.7), ("heavy", 13.5, 0.38)])
def test_styles_are_as_strong_as_the_sets_that_they_stand_for(style, psnr, ssim):
    """Mean PSNR and SSIM of rainy pictures: the sets' own, which photographs of BSDS500 in our rain meet within a
    decibel and 0.05; the demo's photographs are fewer, smaller and brighter."""
    photographs = [read_image(path) for path in find_pictures(ROOT / "Datasets" / "demo")[0] if "target" in path.parts]
    pairs = [(rain_on(photo, seed, style), photo) for photo in photographs for seed in range(3)]
    values = np.mean([psnr_ssim(rainy, clean, "rain200") for rainy, clean in pairs], axis=0)
    assert values[0] == pytest.approx(psnr, abs=3) and values[1] == pytest.approx(ssim, abs=0.15)


def test_some_rain_falls_from_any_side():
    lying = 0
    for seed in range(40):
        y, x = np.gradient(rain_on(GREY, seed, "light").mean(axis=2))
        lying += (y**2).sum() > (x**2).sum()
    assert 1 <= lying < 16


@pytest.mark.parametrize("height, width", [(1, 1), (16, 200), (60, 80)])
@pytest.mark.parametrize("style", STYLES)
def test_pictures_of_any_size_get_rain_whose_layers_are_opacities(height, width, style):
    for seed in range(6):
        assert rain_on(np.zeros((height, width, 3), np.uint8), seed, style).shape == (height, width, 3)
        layer = streaks(height, width, STYLES[style], 10, np.random.default_rng(seed))
        veil = haze(height, width, 0.4, np.random.default_rng(seed))
        for opacity, most in ((layer, STYLES[style].opacity[1]), (veil, 0.4)):
            assert opacity.shape == (height, width) and opacity.min() >= 0 and opacity.max() <= most


def test_veil_light_and_camera_change_pictures_without_streaks(monkeypatch):
    seen = [rain.camera(GREY.astype(np.float32), np.random.default_rng(seed)) for seed in range(200)]
    assert 80 < sum(np.array_equal(picture, GREY) for picture in seen) < 180  # neither noise nor JPEG artefacts
    monkeypatch.setattr(rain, "streaks", lambda height, width, *_: np.zeros((height, width), np.float32))
    monkeypatch.setattr(rain, "camera", lambda picture, rng: picture)
    assert rain_on(0 * GREY, 0, "deep").max() > 1 and rain_on(0 * GREY, 0, "light").max() == 0
    assert abs(rain_on(GREY, 0, "shower").mean() - 90) > 0.1


@pytest.mark.parametrize("angle", [-30, 0, 20])
def test_streaks_have_their_direction_length_and_width(angle):
    kernel = streak_kernel(31, 1.5, angle)
    assert kernel.max() == pytest.approx(1)
    weights = kernel / kernel.sum()
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]] - kernel.shape[0] // 2
    moments = np.array([[(weights * a * b).sum() for b in (x, y)] for a in (x, y)])
    variances, directions = np.linalg.eigh(moments)
    found = np.degrees(np.arctan2(directions[0, 1], directions[1, 1]))
    assert (found - angle + 90) % 180 - 90 == pytest.approx(0, abs=2)
    assert np.sqrt(12 * variances[1]) == pytest.approx(31, rel=0.15)
    assert np.sqrt(variances[0]) == pytest.approx(1.5, rel=0.05)


def test_the_command_writes_pairs_of_a_style(tmp_path):
    for name in ("a", "sub/b"):
        write_png(tmp_path / "photos" / f"{name}.png", GREY)
    means = []
    for style in ("light", "heavy"):
        rain.main([str(tmp_path / "photos"), str(tmp_path / style), "--style", style, "--versions", "4"])
        pairs = [pair.read() for pair in find_pairs(tmp_path / style)]
        assert len(pairs) == len({rainy.tobytes() for rainy, _ in pairs}) == 8
        assert all(np.array_equal(clean, GREY) for _, clean in pairs)
        means.append(np.mean([rainy for rainy, _ in pairs]))
    assert means[0] + 5 < means[1]


def test_the_command_mixes_up_no_names_and_never_replaces_what_it_reads(tmp_path):
    for folder, names in (("versions", ("IMG.png", "IMG_1.png")), ("endings", ("a.png", "a.bmp"))):
        for name in names:
            write_png(tmp_path / folder / name, GREY)
        assert "mixed up" in failure(rain.main, [f"{tmp_path}/{folder}", f"{tmp_path}/set"])
    write_png(tmp_path / "set" / "target" / "a.png", GREY)
    assert "might overwrite your pictures" in failure(rain.main, [f"{tmp_path}/set/target", f"{tmp_path}/set"])
    assert not (tmp_path / "set" / "input").exists()
    write_png(tmp_path / "photos" / "b.png", GREY)
    for _ in range(2):
        rain.main([str(tmp_path / "photos"), str(tmp_path / "photos")])
        assert len(find_pairs(tmp_path / "photos")) == 1
