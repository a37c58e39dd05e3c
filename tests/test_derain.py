import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.backends import cudnn

from ablations import build
from tests.conftest import NARROW, random_picture, save_narrow
from tests.golden import ARRAYS, golden_input, golden_network
from utils.derain import LOCK, MODES, Derainer, derain, is_current, remember_settings, results_settings
from utils.files import UserError
from utils.pictures import read_image, write_picture, write_png


def levels(a, b):
    """The largest difference of two 8-bit pictures."""
    return np.abs(a.astype(int) - b).max()


def test_windows_give_the_published_pictures():
    derainer = Derainer(golden_network("nerd_rain_s"), "window", 64)
    for size in [key.partition("/")[2] for key in ARRAYS if key.startswith("window64/")]:
        picture = golden_input(f"window{size}", 1, 3, *map(int, size.split("x")))[0]
        result = derainer(picture.permute(1, 2, 0).numpy())
        difference = np.abs(np.round(result * 255) - ARRAYS[f"window64/{size}"])
        # Rounding changes values by 3e-5 levels on average: so many may fall on the other side of a half.
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


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
    derainer.forward, derainer.batch_pixels = lambda x: x, batch * window**2
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


@pytest.mark.parametrize("mode", ["window", "tile"])
def test_windows_of_several_pictures_share_a_batch(narrow_net, mode):
    images = [random_picture(*size) for size in ((40, 40), (64, 33), (32, 32), (16, 90), (70, 32))]
    derainer = Derainer(narrow_net, mode, window=32)
    expected = [derainer(image) for image in images]
    forward, shapes, shares = derainer.forward, [], []
    derainer.forward = lambda x: [shapes.append(tuple(x.shape)), forward(x)][1]
    derainer.batch_pixels = 3 * 32 * 32
    results = list(derainer.stream(enumerate(images), shares.append))
    assert [key for key, _ in results] == list(range(len(images)))
    assert all(levels(result, other) <= 1 for (_, result), other in zip(results, expected))  # sums round otherwise
    assert max(count * height * width for count, _, height, width in shapes) == derainer.batch_pixels
    assert sum(shares) == pytest.approx(len(images)) and min(shares) > 0


def test_results_are_copied_before_the_next_batch_replaces_them(narrow_net, monkeypatch):
    """On a fake device that does what is queued only once somebody waits for it, and that reuses one memory for the
    results of all batches, as CUDA graphs do."""
    queue, done, static, running = [], [], torch.zeros(1, 3, 32, 32), []

    class DeviceTensor(torch.Tensor):
        def to(self, device, non_blocking):
            assert LOCK.locked()  # no other thread's batch comes between
            host = torch.full(self.shape, torch.nan)
            queue.append(lambda: host.copy_(static))
            return host

    def record_event():
        position = len(queue)

        def synchronize():
            while len(done) < position:
                done.append(queue[len(done)]())

        return SimpleNamespace(synchronize=synchronize)

    def forward(x):
        assert LOCK.locked()
        x = x.clone()
        queue.append(lambda: static.copy_(1 - x))
        return static.as_subclass(DeviceTensor)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=record_event))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    image, derainer = random_picture(32, 32 * 5), Derainer(narrow_net, "window", 32)
    derainer.gpu, derainer.forward = True, forward
    ((_, result),) = derainer.stream([(None, image)], lambda _: running.append(len(queue)))
    assert np.array_equal(result, 255 - image)
    assert running == [4, 6, 8, 10, 10]  # when a batch is collected, the next one's two steps are queued


def test_on_a_gpu_float32_is_not_tf32_and_cudnn_tries_its_algorithms_for_full_windows_alone(narrow_net):
    derainer, settings = Derainer(narrow_net, window=48), []
    derainer.forward = lambda x: [settings.append((cudnn.allow_tf32, cudnn.benchmark)), x][1]
    list(derainer.stream(enumerate(map(random_picture, (48, 20), (48, 48)))))
    assert settings == [(False, True), (False, False)]


def test_batches_that_exceed_a_gpus_memory_are_halved(narrow_net):
    plain, derainer = Derainer(narrow_net, window=48), Derainer(narrow_net, window=48)
    batches, graph = [], torch.empty(2, 3, 48, 48)

    def compute_or_fail(x):
        batches.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return graph.copy_(plain.compute(x))  # a CUDA graph overwrites its last result, too

    derainer.batch_pixels, derainer.compute_at_once = 8 * 48 * 48, compute_or_fail
    x = torch.rand(8, 3, 48, 48)
    torch.testing.assert_close(derainer.compute(x), plain.compute(x), rtol=0, atol=1e-5)
    assert batches == [8, 4, 2, 2, 4, 2, 2] and derainer.batch_size(48, 48) == 2


def test_the_ensemble_is_the_mean_of_the_mirrored_results(narrow_net):
    plain, ensemble = Derainer(narrow_net), Derainer(narrow_net, ensemble=True)
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    results = [plain.compute(x.flip(sides)).flip(sides) for sides in ((), (3,), (2,), (2, 3))]
    assert all((result - results[0]).abs().max() > 1e-3 for result in results[1:])
    assert (ensemble.compute(x) - sum(results) / 4).abs().max() < 1e-5


def test_bfloat16_weights_are_cast_once_and_give_nearly_the_same_picture(narrow_net):
    image = random_picture(48, 48)
    exact, fast, autocast = (Derainer(narrow_net, window=48, bf16=bf16) for bf16 in (False, True, True))
    autocast.net = narrow_net  # whose weights are cast in every pass
    assert all(parameter.dtype == torch.float32 for parameter in narrow_net.parameters())
    for name, parameter in fast.net.named_parameters():  # layer norms, temperatures and the INRs' first layers stay
        stays = any(part in name for part in ("norm", "temperature", "imnet.layers.0"))
        assert parameter.dtype == (torch.float32 if stays else torch.bfloat16), name
    assert levels(fast(image), autocast(image)) <= 1
    assert 0 < np.abs(exact(image).astype(int) - fast(image)).mean() < 2


def test_a_compiled_network_is_compiled_once_for_pictures_of_all_sizes(monkeypatch):
    """With two scales of one pass: tracing the whole network takes long."""
    compiler, graphs = torch.compile, []

    def compile_without_compiler(net, mode, dynamic):
        return compiler(net, dynamic=dynamic, backend=lambda graph, _: [graphs.append(graph), graph][1])

    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    images = [random_picture(*size) for size in ((40, 40), (20, 64), (64, 33), (100, 70))]
    derainer = Derainer(build(**NARROW, passes=(0, 1, 1), inr="first"), "tile", 32)
    expected = [derainer(image) for image in images]
    derainer.batch_pixels = 3 * 32 * 32
    derainer.compile()
    for (_, result), other in zip(derainer.stream(enumerate(images)), expected):
        assert levels(result, other) <= 1
    assert derainer.compiled and len(graphs) == 1


@pytest.mark.parametrize("good_calls", [0, 1])  # a CUDA graph is recorded in the second call
def test_a_network_that_cannot_be_compiled_runs_as_it_is(narrow_net, monkeypatch, caplog, good_calls):
    def compiled(net, **_):
        return Mock(side_effect=[net(torch.zeros(1, 3, 32, 32))] * good_calls + [RuntimeError("no compiler\nmore")])

    monkeypatch.setattr(torch, "compile", compiled)
    image = random_picture(64, 64)
    assert np.array_equal(Derainer(narrow_net, window=32, compile=True)(image), Derainer(narrow_net, window=32)(image))
    assert "uncompiled, as torch.compile failed: no compiler" in caplog.text and "more" not in caplog.text


def test_files_are_read_ahead_and_written_behind(narrow_net, tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    outputs = {path: tmp_path / "out" / path.name for path in paths}
    for i, path in enumerate(paths):
        write_png(path, random_picture(20, 30, i))
    paths[2].write_bytes(b"broken")

    def write_or_fail(path, result, quality):
        if path == outputs[paths[4]]:
            raise UserError("full")
        write_picture(path, result, quality)

    monkeypatch.setattr("utils.derain.write_picture", write_or_fail)
    derainer = Derainer(narrow_net)
    for derainer.threads in (1, 3):
        shares = []
        errors = dict(derainer.files(outputs, progress=shares.append))
        assert set(errors) == set(paths) and sum(shares) == pytest.approx(7)
        assert "2.png cannot be read" in str(errors.pop(paths[2])) and str(errors.pop(paths[4])) == "full"
        for path, error in errors.items():
            assert error is None and np.array_equal(read_image(outputs[path]), derainer(read_image(path)))
            outputs[path].unlink()
    monkeypatch.setattr("utils.derain.write_picture", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an unexpected failure is not swallowed
        list(derainer.files(outputs))


def test_options_that_do_not_fit_are_refused(narrow_net):
    for options in ({"window": 0}, {"window": 100}, {"mode": "tiles"}, {"mode": "whole", "compile": True}):
        with pytest.raises(UserError, match="must be"):
            Derainer(narrow_net, **options)


def test_results_are_current_if_newer_and_made_with_the_same_settings(narrow_net, narrow_weights, tmp_path):
    folder, source, result = tmp_path / "out", tmp_path / "a.png", tmp_path / "out" / "sub" / "a.png"
    result.parent.mkdir(parents=True)
    source.touch()
    result.touch()
    made = results_settings(narrow_weights, Derainer(narrow_net), [tmp_path])
    assert not is_current(result, source, made, folder)  # nobody knows how it was made
    remember_settings(folder, made)
    os.utime(folder / "settings.json", (1000, 1000))
    os.utime(source, (900, 900))
    remember_settings(folder, dict(made))  # is no change
    for changed, expected in ((999, False), (1000, True), (1001, True)):
        os.utime(result, (changed, changed))
        assert is_current(result, source, made, folder) == expected
    assert not is_current(result.with_name("b.png"), source, made, folder)
    other_weights = save_narrow(tmp_path / "a.pth", seed=1)
    assert not is_current(result, source, results_settings(other_weights, Derainer(narrow_net), [tmp_path]), folder)
    for options in ({"mode": "window"}, {"window": 128}, {"bf16": True}, {"ensemble": True}):
        settings = results_settings(narrow_weights, Derainer(narrow_net, **options), [tmp_path])
        assert not is_current(result, source, settings, folder)
    os.utime(source, (1002, 1002))
    assert not is_current(result, source, made, folder)


def test_a_settings_file_of_another_program_is_not_replaced(tmp_path):
    for content in ("", "[1]", '{"editor.fontSize": 12}'):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(UserError, match=r"settings\.json .* choose another folder"):
            remember_settings(tmp_path, {"weights": "0"})
        assert (tmp_path / "settings.json").read_text() == content


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 1), (40, 50, 2), (40, 50, 3), (40, 50, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_all_kinds_come_back_as_they_went_in(narrow_weights, narrow_net, shape, dtype):
    values = np.random.default_rng(0).random(shape)
    image = values.astype(dtype) if np.issubdtype(dtype, np.floating) else (values * np.iinfo(dtype).max).astype(dtype)
    result = derain(image, narrow_weights, gpus="cpu")
    assert result.shape == shape and result.dtype == dtype and not np.array_equal(result, image)
    if shape[2:] in ((2,), (4,)):
        assert np.array_equal(result[..., -1], image[..., -1])
    if shape[2:] in ((3,), (4,)):
        assert np.array_equal(result[..., :3], Derainer(narrow_net)(image[..., :3]))
    else:
        grey = Derainer(narrow_net)(image.reshape(40, 50, -1)[..., [0, 0, 0]]).mean(axis=2)
        rounding = 1e-6 if np.issubdtype(dtype, np.floating) else 0.5
        assert np.abs(result.reshape(40, 50, -1)[..., 0] - grey).max() <= rounding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "P", "RGBA", "CMYK"])
def test_images_come_back_as_they_went_in(narrow_weights, mode):
    image = Image.fromarray(random_picture(40, 50)).convert(mode)
    image.info["icc_profile"] = b"profile"
    result = derain(image, narrow_weights, gpus="cpu")
    assert result.mode == {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)
    assert ("icc_profile" in result.info) == (mode != "CMYK")
    if mode == result.mode:
        assert np.array_equal(result, derain(np.asarray(image), narrow_weights, gpus="cpu"))


def test_files_are_derained_to_files(narrow_weights, narrow_net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = random_picture(40, 50)
    write_png("a.png", pixels)
    assert derain("a.png", narrow_weights, gpus="cpu") == Path("results/a.png")
    assert np.array_equal(read_image("results/a.png"), derain(pixels, narrow_weights, gpus="cpu"))
    windows = derain(pixels, narrow_weights, gpus="cpu", mode="window", window=16)
    assert np.array_equal(windows, Derainer(narrow_net, "window", 16)(pixels))
    assert derain(Path("a.png"), narrow_weights, output="b.tif", gpus="cpu") == Path("b.tif") and Path("b.tif").exists()
    with pytest.raises(UserError, match=r"results/a\.png: its result would overwrite it"):
        derain("results/a.png", narrow_weights, gpus="cpu")
    with pytest.raises(UserError, match=r"c\.pth does not exist"):
        derain("a.png", "c.pth", gpus="cpu")


def test_arrays_that_are_no_pictures_are_refused(narrow_weights):
    wrong_shapes = np.zeros((4, 4, 5), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((0, 4, 3))
    wrong_values = np.full((4, 4), 255.0), np.full((4, 4), np.nan), np.zeros((4, 4), int)
    for image in (*wrong_shapes, *wrong_values, [[0]], torch.zeros(4, 4, 3)):
        with pytest.raises(ValueError, match="expected"):
            derain(image, narrow_weights, gpus="cpu")


def test_another_checkpoint_of_the_same_name_is_noticed(tmp_path):
    image, path = np.full((32, 32, 3), 100, np.uint8), save_narrow(tmp_path / "a.pth")
    first = derain(image, path, gpus="cpu")
    save_narrow(path, seed=5)
    os.utime(path, (1000, 1000))  # some file systems count in seconds
    assert not np.array_equal(derain(image, path, gpus="cpu"), first)
