import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ablations import build
from tests.golden import ARRAYS, golden_input, golden_network
from utils.checkpoint import load_network, save_checkpoint
from utils.derain import (
    MODES,
    Derainer,
    derain,
    is_current,
    remember_settings,
    results_settings,
    tile_spans,
    to_image,
    window_spans,
)
from utils.files import UserError
from utils.pictures import read_image, read_picture, write_png

NARROW = {"dim": 8, "num_blocks": (1, 1, 1)}


@pytest.fixture(scope="module")
def reference_net():
    return golden_network("nerd_rain_s")


@pytest.fixture(scope="module")
def narrow_net():
    torch.manual_seed(0)
    return build(**NARROW)


def random_picture(height, width, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype=dtype, endpoint=True)


def levels(a, b):
    """The largest difference of two 8-bit pictures."""
    return np.abs(a.astype(int) - b).max()


@pytest.mark.parametrize("key", [key for key in ARRAYS if key.startswith("window64/")])
def test_windows_give_the_published_pictures(reference_net, key):
    size = key.partition("/")[2]
    height, width = map(int, size.split("x"))
    picture = golden_input(f"window{size}", 1, 3, height, width)[0]
    result = Derainer(reference_net, "window", 64)(picture.permute(1, 2, 0).numpy())
    assert result.dtype == np.float32
    difference = np.abs(to_image(torch.from_numpy(result).permute(2, 0, 1)).astype(int) - ARRAYS[key])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-4


@given(window=st.sampled_from([16, 48, 256]), beyond=st.integers(0, 700))
def test_windows_cover_every_pixel_once_and_tiles_sum_to_one(window, beyond):
    side, overlap = window + beyond, window // 8
    windows, tiles = window_spans(side, window), tile_spans(side, window, overlap)
    for spans in (windows, tiles):
        total = np.zeros(side)
        for start, weights in spans:
            assert weights.min() >= 0 and weights.max() > 0
            total[start : start + window] += weights
        assert total == pytest.approx(1, abs=1e-6)
    assert all(np.isin(weights, (0, 1)).all() for _, weights in windows)
    assert np.diff([start for start, _ in tiles]).max(initial=0) <= window - overlap


@settings(max_examples=60)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    mode=st.sampled_from(MODES),
    window=st.sampled_from([16, 48, 64, 256]),
    batch=st.integers(1, 5),
)
def test_a_network_that_changes_nothing_returns_the_picture(narrow_net, height, width, dtype, mode, window, batch):
    image = random_picture(height, width, dtype=np.uint16 if dtype == np.float32 else dtype)
    image = (image / 65535).astype(dtype) if dtype == np.float32 else image
    derainer = Derainer(narrow_net, mode, window)
    derainer.forward, derainer.pixels = lambda x: x, batch * window**2
    result = derainer(image)
    assert result.dtype == dtype and result.shape == image.shape
    assert np.abs(result.astype(float) - image).max() <= (1e-6 if dtype == np.float32 else 0)


@pytest.mark.parametrize("mode", MODES)
def test_results_are_clamped_and_rounded_and_keep_their_precision(narrow_net, mode):
    image, derainer = random_picture(70, 33, dtype=np.uint16), Derainer(narrow_net, mode, window=32)
    exact = derainer((image / np.float32(65535)).astype(np.float32))
    assert exact.min() >= 0 and exact.max() <= 1 and exact.std() > 0.1
    assert np.abs(derainer(image) / 65535 - exact).max() < 1e-5
    small = random_picture(70, 33)
    assert levels(derainer(small), np.round(derainer(np.float32(small / 255)) * 255)) <= 1


def test_a_short_side_is_reflected_to_a_multiple_of_16(narrow_net):
    image = random_picture(20, 48)
    padded = np.concatenate([image, image[18:6:-1]])  # 32 rows
    expected = Derainer(narrow_net, "whole")(padded)[:20]
    assert all(np.array_equal(Derainer(narrow_net, mode, 64)(image), expected) for mode in MODES)


def test_tiles_leave_no_seam_where_windows_do(narrow_net):
    """Steps between neighbouring columns, at the borders of windows against elsewhere, for a network whose results
    depend on all of a window, as channel attention's do."""
    image = np.random.default_rng(0).random((64, 200, 3), dtype=np.float32) * 0.1 + np.linspace(0, 0.6, 200)[:, None]

    def excess(mode, borders):
        derainer = Derainer(narrow_net, mode, window=64)
        derainer.forward = lambda x: x + 0.3 * x.mean(dim=(1, 2, 3), keepdim=True)
        steps = np.abs(np.diff(derainer(image.astype(np.float32)), axis=1)).mean(axis=(0, 2))
        return steps[borders].mean() / np.delete(steps, borders).mean()

    faded = [column for start, _ in tile_spans(200, 64, 8)[1:] for column in range(start, start + 8)]
    assert excess("tile", faded) < 1.1
    assert excess("window", [63, 127, 191]) > 1.5


@pytest.mark.parametrize("mode", ["window", "tile"])
def test_windows_of_several_pictures_share_a_batch(narrow_net, mode):
    sizes = ((40, 40), (64, 33), (32, 32), (16, 90), (70, 32))
    images = [random_picture(*size, seed) for seed, size in enumerate(sizes)]
    derainer = Derainer(narrow_net, mode, window=32)
    expected = [derainer(image) for image in images]
    forward, shapes, shares = derainer.forward, [], []
    derainer.forward = lambda x: [shapes.append(tuple(x.shape)), forward(x)][1]
    derainer.pixels = 3 * 32 * 32
    results = list(derainer.pictures(enumerate(images), shares.append))
    assert [key for key, _ in results] == list(range(len(images)))
    assert all(levels(result, other) <= 1 for (_, result), other in zip(results, expected))  # sums round otherwise
    assert max(count * height * width for count, _, height, width in shapes) == derainer.pixels
    assert sum(shares) == pytest.approx(len(images)) and min(shares) > 0


def test_memory_holds_one_row_of_windows(narrow_net):
    derainer, heights = Derainer(narrow_net, "tile", 32), []
    derainer.forward = lambda x: x
    image = random_picture(400, 48)
    for batch in derainer.batches([(None, image)]):
        for canvas, window in batch:
            canvas.add(window)
            heights.append(canvas.sums.shape[1])
    assert max(heights) == 32 and len(heights) == canvas.count and np.array_equal(canvas.result, image)


class DeviceTensor(torch.Tensor):
    """A tensor of a fake device, which copies to the CPU when its queue is worked off."""

    def to(self, device, non_blocking):
        assert device == "cpu" and non_blocking
        host, source = torch.full(self.shape, torch.nan), self.as_subclass(torch.Tensor)
        FakeStream.queue.append(lambda: host.copy_(source))
        return host


class FakeStream:
    """Does what is queued only once somebody waits for an event behind it."""

    queue, done = [], 0

    def record_event(self):
        self.position = len(self.queue)
        return self

    def synchronize(self):
        while FakeStream.done < self.position:
            self.queue[FakeStream.done]()
            FakeStream.done += 1


def test_results_are_copied_before_the_next_batch_replaces_them(narrow_net, monkeypatch):
    """On a fake device that reuses one memory for the results of all batches, as CUDA graphs do."""
    FakeStream.queue, FakeStream.done = [], 0
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    image, static, running = random_picture(32, 32 * 5), torch.zeros(1, 3, 32, 32), []
    derainer = Derainer(narrow_net, "window", 32)
    derainer.gpu = True

    def forward(x):
        x = x.clone()
        FakeStream.queue.append(lambda: static.copy_(1 - x))
        return static.as_subclass(DeviceTensor)

    derainer.forward = forward
    ((_, result),) = derainer.pictures([(None, image)], lambda _: running.append(len(FakeStream.queue)))
    assert np.array_equal(result, 255 - image)
    assert running == [4, 6, 8, 10, 10]  # when a batch is collected, the next one's two steps are queued


def test_float32_on_a_gpu_is_not_tf32(narrow_net):
    seen, before, derainer = [], torch.backends.cudnn.allow_tf32, Derainer(narrow_net, window=32)
    derainer.forward = lambda x: [seen.append(torch.backends.cudnn.allow_tf32), x][1]
    derainer(random_picture(32, 32))
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


def test_the_ensemble_turns_with_the_picture(narrow_net):
    image = random_picture(32, 48).astype(np.float32) / 255
    plain, ensemble = Derainer(narrow_net), Derainer(narrow_net, ensemble=True)
    turned = np.ascontiguousarray(np.rot90(image)[:, ::-1])
    back = np.rot90(ensemble(turned)[:, ::-1], -1)
    assert np.abs(back - ensemble(image)).max() < 1e-5
    assert np.abs(np.rot90(plain(turned)[:, ::-1], -1) - plain(image)).max() > 1e-3


def count_casts(derainer, image):
    """-> how many tensors are cast on the way, and the result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = derainer(image)
    return sum(event.name == "aten::_to_copy" for event in profile.events()), result


def test_bfloat16_weights_are_cast_once_and_give_nearly_the_same_picture(reference_net):
    image = random_picture(48, 48)
    exact, fast, autocast = (Derainer(reference_net, window=48, bf16=bf16) for bf16 in (False, True, True))
    autocast.net = reference_net
    casts, result = count_casts(fast, image)
    usual_casts, usual = count_casts(autocast, image)
    layers = [module for module in fast.net.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert usual_casts - casts >= len(layers) - 2  # all but the INRs' first
    assert all(parameter.dtype == torch.float32 for parameter in reference_net.parameters())
    norms = [tensor for name, tensor in fast.net.named_parameters() if ".norm" in name or "temperature" in name]
    assert norms and all(tensor.dtype == torch.float32 for tensor in norms)
    assert levels(result, usual) <= 2
    assert 10 * np.log10(255**2 / max(np.mean((result.astype(float) - usual) ** 2), 1e-9)) > 55
    assert 0 < np.abs(exact(image).astype(int) - result).mean() < 2


def test_a_compiled_network_is_compiled_once_for_pictures_of_all_sizes(narrow_net, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode, **options: compiler(net, backend="eager", **options))
    torch._dynamo.reset()
    images = [random_picture(*size, seed) for seed, size in enumerate([(40, 40), (20, 64), (64, 33), (100, 70)])]
    derainer = Derainer(narrow_net, "tile", 32)
    expected = [derainer(image) for image in images]
    derainer.pixels = 3 * 32 * 32
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    derainer.compile()
    assert derainer.compiled
    for (_, result), other in zip(derainer.pictures(enumerate(images)), expected):
        assert levels(result, other) <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("good_calls", [0, 1])  # a CUDA graph is recorded in the second call
def test_a_network_that_cannot_be_compiled_runs_as_it_is(narrow_net, monkeypatch, caplog, good_calls):
    def compiled(net, **_):
        calls = iter(range(good_calls))

        def run(x):
            if next(calls, None) is None:
                raise RuntimeError("no C++ compiler\nmore")
            return net(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    image = random_picture(64, 64)
    assert np.array_equal(Derainer(narrow_net, window=32, compile=True)(image), Derainer(narrow_net, window=32)(image))
    assert "uncompiled, as torch.compile failed: no C++ compiler" in caplog.text and "more" not in caplog.text


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

    derainer = Derainer(narrow_net)
    for derainer.threads in (1, 3):
        shares = []
        results = dict(derainer.files(paths, finish, shares.append))
        assert set(results) == set(paths) and sum(shares) == pytest.approx(7)
        assert "2.png cannot be read" in str(results[paths[2]]) and str(results[paths[4]]) == "full"
        assert all(np.array_equal(results[paths[i]], derainer(read_image(paths[i]))) for i in (0, 1, 3, 5, 6))
    assert list(derainer.files([], finish)) == []
    with pytest.raises(ZeroDivisionError):  # an unexpected failure is not swallowed
        list(derainer.files(paths[:1], lambda *_: 1 / 0))


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": 100}, {"mode": "tiles"}, {"mode": "whole", "compile": True}]
)
def test_options_that_do_not_fit_are_refused(narrow_net, options):
    with pytest.raises(UserError, match="must be"):
        Derainer(narrow_net, **options)


def test_results_are_current_if_made_with_the_same_weights_and_settings(narrow_net, narrow_weights, tmp_path):
    folder, result = tmp_path / "out", tmp_path / "out" / "sub" / "a.png"
    result.parent.mkdir(parents=True)
    result.touch()
    made = results_settings(narrow_weights, Derainer(narrow_net))
    assert not is_current(result, made, folder)  # nobody knows how it was made
    remember_settings(folder, made)
    since = (folder / "settings.json").stat().st_mtime_ns
    for age, expected in ((-1, False), (0, True), (1, True)):
        os.utime(result, ns=(since + age * 10**9, since + age * 10**9))
        assert is_current(result, made, folder) == expected
    assert not is_current(result.with_name("b.png"), made, folder)
    remember_settings(folder, dict(made))  # is no change
    assert (folder / "settings.json").stat().st_mtime_ns == since
    other_weights = tmp_path / "a.pth"
    other_weights.write_bytes(narrow_weights.read_bytes() + b"\0")
    options = {"mode": "window"}, {"window": 128}, {"bf16": True}, {"ensemble": True}
    others = [results_settings(narrow_weights, Derainer(narrow_net, **option)) for option in options]
    for other in [*others, results_settings(other_weights, Derainer(narrow_net))]:
        assert not is_current(result, other, folder)


@pytest.mark.parametrize("content", ["", "[1]", '{"editor.fontSize": 12}'])
def test_a_settings_file_of_another_program_is_not_replaced(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json .* choose another folder"):
        remember_settings(tmp_path, {"weights": "0"})
    assert (tmp_path / "settings.json").read_text() == content


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
        np.testing.assert_array_equal(result, Derainer(load_network(narrow_weights))(image))


KEPT_MODES = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "P": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}


@pytest.mark.parametrize("mode, kept", KEPT_MODES.items())
def test_images_come_back_as_they_went_in(narrow_weights, mode, kept):
    image = Image.fromarray(random_picture(40, 50)).convert(mode)
    image.info["icc_profile"] = b"profile"
    result = derain(image, narrow_weights, gpus="cpu")
    assert result.mode == kept and ("icc_profile" in result.info) == (mode != "CMYK")
    if mode == kept:
        np.testing.assert_array_equal(np.asarray(result), derain(np.asarray(image), narrow_weights, gpus="cpu"))


def test_files_are_derained_to_files(narrow_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = random_picture(40, 50)
    write_png("a.png", pixels)
    assert derain("a.png", narrow_weights, gpus="cpu") == Path("results/a.png")
    assert np.array_equal(read_image("results/a.png"), derain(pixels, narrow_weights, gpus="cpu"))
    Image.fromarray(pixels).convert("RGBA").save("d.png")
    assert derain(Path("d.png"), narrow_weights, output="b.tif", gpus="cpu") == Path("b.tif")
    assert read_picture("b.tif").alpha is not None
    for image, options, message in (
        ("d.png", {"output": "a.pdf"}, r"a\.pdf cannot be written"),
        ("results/a.png", {}, r"results/a\.png: its result would overwrite it"),
        ("c.png", {}, r"c\.png does not exist"),
        ("a.png", {"weights": "c.pth"}, r"c\.pth does not exist"),
        ("a.png", {"gpus": 99}, r"--gpus 99: PyTorch .* GPUs here"),
    ):
        with pytest.raises(UserError, match=message):
            derain(image, **{"weights": narrow_weights, "gpus": "cpu", **options})


NO_PICTURES = [
    *(np.zeros((4, 4, 5), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((4, 4), int), np.zeros((0, 4, 3)), [[0]]),
    *(np.full((4, 4), 255.0), np.full((4, 4), np.nan), torch.zeros(4, 4, 3)),
]


@pytest.mark.parametrize("image", NO_PICTURES)
def test_arrays_that_are_no_pictures_are_refused(narrow_weights, image):
    with pytest.raises(ValueError, match="expected"):
        derain(image, narrow_weights, gpus="cpu")


def test_another_checkpoint_of_the_same_name_is_noticed(narrow_weights, tmp_path):
    image, path = np.full((32, 32, 3), 100, np.uint8), tmp_path / "a.pth"
    shutil.copy(narrow_weights, path)
    first = derain(image, path, gpus="cpu")
    torch.manual_seed(5)
    save_checkpoint(path, state_dict=build(**NARROW).state_dict())
    assert not np.array_equal(derain(image, path, gpus="cpu"), first)
