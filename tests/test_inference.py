import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import MultiscaleNet
from tests.golden import ARRAYS, golden_input, golden_network
from utils.checkpoint import load_network, save_checkpoint
from utils.errors import UserError
from utils.formats import read_picture
from utils.images import read_image, to_image, write_png
from utils.inference import Derainer, derain, tile_spans, window_spans


@pytest.fixture(scope="module")
def reference_net():
    return golden_network("nerd_rain_s").to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def narrow_net():
    torch.manual_seed(0)
    return MultiscaleNet(dim=8, num_blocks=(1, 1, 1))


def random_picture(height, width, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("key", [key for key in ARRAYS if key.startswith("window64/")])
def test_windows_give_the_published_pictures(reference_net, key):
    size = key.partition("/")[2]
    height, width = map(int, size.split("x"))
    picture = golden_input(f"window{size}", 1, 3, height, width)[0]
    result = Derainer(reference_net, window=64)(picture.permute(1, 2, 0).numpy())
    assert result.dtype == np.float32
    difference = np.abs(to_image(torch.from_numpy(result).permute(2, 0, 1)).astype(int) - ARRAYS[key])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-4


def test_windows_cover_every_pixel_once_and_tiles_sum_to_one():
    for side in range(1, 200):
        for window in (16, 48):
            if side < window:
                continue
            for spans in (window_spans(side, window), tile_spans(side, window, window // 8)):
                total = np.zeros(side)
                for start, weights in spans:
                    assert start >= 0 and len(weights) == window and weights.min() >= 0
                    total[start : start + window] += weights
                assert total == pytest.approx(1, abs=1e-6)
                starts = [start for start, _ in spans]
                assert starts == sorted(set(starts))
            assert all(np.isin(weights, (0, 1)).all() for _, weights in window_spans(side, window))
            assert all(b - a <= window - window // 8 for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("mode", [None, "window", "tile", "whole"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3), (16, 16), (31, 33), (64, 20), (70, 100)])
def test_any_size_is_derained(narrow_net, size, mode):
    image, derain = random_picture(*size), Derainer(narrow_net, mode, window=32)
    result = derain(image)
    assert result.shape == image.shape and result.dtype == np.uint8
    assert np.array_equal(result, derain(image))


def test_a_short_side_is_reflected_to_a_multiple_of_16(narrow_net):
    image = random_picture(20, 48)
    padded = np.concatenate([image, image[18:6:-1]])  # 32 rows
    derain = Derainer(narrow_net, window=64)
    assert np.array_equal(derain(image), derain(padded)[:20])


def test_small_pictures_are_the_same_in_every_mode(narrow_net):
    image = random_picture(40, 27)
    results = [Derainer(narrow_net, mode, window=48)(image) for mode in ("window", "tile", "whole")]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_large_pictures_are_tiled_by_default(narrow_net, monkeypatch):
    monkeypatch.setattr("utils.inference.LARGE", 50 * 70)
    small, large = random_picture(50, 70), random_picture(50, 71)
    default, window, tile = (Derainer(narrow_net, mode, window=32) for mode in (None, "window", "tile"))
    assert np.array_equal(default(small), window(small)) and not np.array_equal(default(small), tile(small))
    assert np.array_equal(default(large), tile(large)) and not np.array_equal(default(large), window(large))


def test_tiles_leave_no_seam_where_windows_do(narrow_net):
    """Steps between neighbouring columns, at the borders of windows against elsewhere, for a network whose results
    depend on all of a window, as channel attention's do."""
    image = np.random.default_rng(0).random((64, 200, 3), dtype=np.float32) * 0.1 + np.linspace(0, 0.6, 200)[:, None]

    def excess(mode, borders):
        derain = Derainer(narrow_net, mode, window=64)
        derain.forward = lambda x: x + 0.3 * x.mean(dim=(1, 2, 3), keepdim=True)
        steps = np.abs(np.diff(derain(image.astype(np.float32)), axis=1)).mean(axis=(0, 2))
        return steps[borders].mean() / np.delete(steps, borders).mean()

    faded = [column for start, _ in tile_spans(200, 64, 8)[1:] for column in range(start, start + 8)]
    assert excess("tile", faded) < 1.1
    assert excess("window", [63, 127, 191]) > 1.5


def test_windows_of_several_pictures_share_a_batch(narrow_net):
    sizes = ((40, 40), (64, 33), (32, 32), (16, 90), (70, 32))
    images = [random_picture(*size, seed) for seed, size in enumerate(sizes)]
    for mode in ("window", "tile"):
        derain = Derainer(narrow_net, mode, window=32)
        expected = [derain(image) for image in images]
        derain.batch, batches = 3, []
        narrow_net.register_forward_pre_hook(lambda _, x, batches=batches: batches.append(len(x[0])))
        results = list(derain.pictures(enumerate(images)))
        assert [key for key, _ in results] == list(range(len(images))) and max(batches) == 3
        for (_, result), other in zip(results, expected):
            assert np.abs(result.astype(int) - other).max() <= 1


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this setting came with PyTorch 2.9")
def test_float32_on_a_gpu_is_not_tf32(narrow_net):
    """The setting is the caller's again afterwards, also where the network fails."""
    convolutions, seen = torch.backends.cudnn.conv, []
    assert convolutions.fp32_precision == "tf32", "PyTorch's default has changed"

    def fail(x):
        seen.append(convolutions.fp32_precision)
        raise ArithmeticError

    derain = Derainer(narrow_net, window=32)
    derain.forward = fail
    with pytest.raises(ArithmeticError):
        derain(random_picture(32, 32))
    assert seen == ["ieee"] and convolutions.fp32_precision == "tf32"


def test_no_more_than_a_row_of_windows_is_held(narrow_net):
    """The picture may be anything that can be sliced; it is asked for one band at a time and results come likewise."""

    class Scan:
        shape, dtype = (400, 48, 3), np.dtype(np.uint8)

        def __getitem__(self, rows):
            asked.append(rows)
            return random_picture(rows.stop - rows.start, 48, seed=rows.start)

    asked = []
    bands = [rows for _, rows in Derainer(narrow_net, "tile", window=32).stream([("scan", Scan())])]
    assert sum(map(len, bands)) == 400 and max(map(len, bands)) <= 32
    assert len(asked) == len(bands) and max(rows.stop - rows.start for rows in asked) == 32


def test_sixteen_bits_and_floats_keep_their_precision(narrow_net):
    image = random_picture(32, 48, dtype=np.uint16)
    derain = Derainer(narrow_net)
    sixteen, exact = derain(image), derain((image / np.float32(65535)).astype(np.float32))
    assert sixteen.dtype == np.uint16 and exact.dtype == np.float32 and exact.min() >= 0 and exact.max() <= 1
    assert np.abs(sixteen / 65535 - exact).max() < 1e-5
    assert len(np.unique(sixteen)) > 256


def test_the_ensemble_turns_with_the_picture(narrow_net):
    image = random_picture(32, 48).astype(np.float32) / 255
    plain, ensemble = Derainer(narrow_net), Derainer(narrow_net, ensemble=True)
    turned = np.ascontiguousarray(np.rot90(image)[:, ::-1])
    back = np.rot90(ensemble(turned)[:, ::-1], -1)
    assert np.abs(back - ensemble(image)).max() < 1e-5
    assert np.abs(np.rot90(plain(turned)[:, ::-1], -1) - plain(image)).max() > 1e-3


def test_files_are_read_ahead_and_finished_behind(narrow_net, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        write_png(path, random_picture(20, 30, i))
    paths[2].write_bytes(b"broken")

    def finish(path, picture, result):
        assert np.array_equal(picture.pixels, read_image(path))
        if path == paths[4]:
            raise UserError("full")
        return result.pixels

    derain = Derainer(narrow_net)
    for derain.threads in (1, 3):
        results = dict(derain.files(paths, finish))
        assert set(results) == set(paths)
        assert "2.png cannot be read" in str(results[paths[2]]) and str(results[paths[4]]) == "full"
        assert all(np.array_equal(results[paths[i]], derain(read_image(paths[i]))) for i in (0, 1, 3, 5, 6))
    assert list(derain.files([], finish)) == []


def test_an_unexpected_failure_is_not_swallowed(narrow_net, tmp_path):
    write_png(tmp_path / "a.png", random_picture(20, 30))
    with pytest.raises(ZeroDivisionError):
        list(Derainer(narrow_net).files([tmp_path / "a.png"], lambda *_: 1 / 0))


@pytest.mark.parametrize("options", [{"window": 0}, {"window": -16}, {"window": 100}, {"mode": "tiles"}])
def test_windows_must_fit_the_network_and_modes_exist(narrow_net, options):
    with pytest.raises(ValueError, match="must be"):
        Derainer(narrow_net, **options)


def test_fused_kernels_ask_for_a_gpu(narrow_net):
    with pytest.raises(UserError, match="leave --fused away"):
        Derainer(narrow_net, fused=True)


def test_bfloat16_gives_nearly_the_same_picture():
    net, image = golden_network("nerd_rain_s"), random_picture(40, 48)
    exact, fast = (Derainer(net, window=48, bf16=bf16)(image).astype(int) for bf16 in (False, True))
    assert 0 < np.abs(exact - fast).mean() < 2


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 1), (40, 50, 2), (40, 50, 3), (40, 50, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_all_kinds_come_back_as_they_went_in(narrow_weights, shape, dtype):
    values = np.random.default_rng(0).random(shape)
    image = values.astype(dtype) if np.issubdtype(dtype, np.floating) else (values * np.iinfo(dtype).max).astype(dtype)
    result = derain(image, narrow_weights, gpus="cpu")
    assert result.shape == shape and result.dtype == dtype and not np.array_equal(result, image)
    channels = np.atleast_3d(image)
    if channels.shape[2] in (2, 4):
        np.testing.assert_array_equal(np.atleast_3d(result)[..., -1], channels[..., -1])
    if shape == (40, 50, 3):
        np.testing.assert_array_equal(result, Derainer(load_network(narrow_weights).eval())(image))


def test_images_and_files_come_back_as_they_went_in(narrow_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = derain(pixels, narrow_weights, gpus="cpu")
    result = derain(Image.fromarray(pixels), narrow_weights, gpus="cpu")
    assert isinstance(result, Image.Image) and np.array_equal(np.asarray(result), expected)
    for mode, kept in (("1", "L"), ("L", "L"), ("LA", "LA"), ("P", "RGB"), ("RGBA", "RGBA"), ("CMYK", "RGB")):
        image = Image.fromarray(pixels).convert(mode)
        assert derain(image, narrow_weights, gpus="cpu").mode == kept
    grey = np.float32(pixels[..., 0] / 255)
    result = derain(Image.fromarray(grey), narrow_weights, gpus="cpu")
    np.testing.assert_array_equal(np.asarray(result), derain(grey, narrow_weights, gpus="cpu"))
    Image.fromarray(pixels).save("a.png")
    assert derain("a.png", narrow_weights, gpus="cpu") == Path("results/a.png")
    assert np.array_equal(read_image("results/a.png"), expected)
    assert derain(Path("a.png"), narrow_weights, output="b.tif", gpus="cpu") == Path("b.tif")
    Image.fromarray(pixels).convert("RGBA").save("d.png")
    assert derain("d.png", narrow_weights, output="d.jpg", gpus="cpu") == Path("d.jpg.png")
    assert read_picture("d.jpg.png").alpha is not None
    Path("folder").mkdir()
    assert derain("a.png", narrow_weights, output="folder", gpus="cpu") == Path("folder/a.png")
    for name in ("b.gif", "b.pdf", "b"):  # which cannot hold it, are no pictures, say nothing
        assert derain("a.png", narrow_weights, output=name, gpus="cpu") == Path(f"{name}.png")
        assert np.array_equal(read_image(f"{name}.png"), expected)
    profiled = Image.fromarray(pixels)
    profiled.info["icc_profile"] = b"profile"
    assert derain(profiled, narrow_weights, gpus="cpu").info == {"icc_profile": b"profile"}
    with pytest.raises(UserError, match=r"results/a\.png: its result would overwrite it"):
        derain("results/a.png", narrow_weights, gpus="cpu")
    with pytest.raises(UserError, match=r"c\.png does not exist"):
        derain("c.png", narrow_weights, gpus="cpu")
    with pytest.raises(UserError, match=r"c\.pth does not exist"):
        derain("a.png", "c.pth", gpus="cpu")
    with pytest.raises(UserError, match=r"--gpus 99: PyTorch .* GPUs here"):
        derain("a.png", narrow_weights, gpus=99)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((2, 4, 4, 3)),
        np.zeros((4, 4), int),
        np.full((4, 4), 255.0),
        np.full((4, 4), np.nan),
        torch.zeros(4, 4, 3),
        [[0]],
    ],
)
def test_arrays_that_are_no_pictures_are_refused(narrow_weights, image):
    with pytest.raises(ValueError, match="expected"):
        derain(image, narrow_weights, gpus="cpu")


def test_another_checkpoint_of_the_same_name_is_noticed(narrow_weights, tmp_path):
    image, path = np.full((32, 32, 3), 100, np.uint8), tmp_path / "a.pth"
    shutil.copy(narrow_weights, path)
    first = derain(image, path, gpus="cpu")
    torch.manual_seed(5)
    save_checkpoint(path, state_dict=MultiscaleNet(8, (1, 1, 1)).state_dict())
    assert not np.array_equal(derain(image, path, gpus="cpu"), first)
