import subprocess
import sys

import numpy as np
import pytest
import torch

import export
from ablations import build
from tests.conftest import ROOT, make_pairs, random_picture
from utils.checkpoint import save_checkpoint
from utils.derain import Derainer
from utils.pictures import Picture, read_image, write_picture, write_png

onnx, onnxruntime, _ = (
    pytest.importorskip(name, reason="it is not installed: pip install -r requirements-extras.txt")
    for name in ("onnx", "onnxruntime", "onnxscript")
)
pytestmark = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the exporter of PyTorch 2.6 fails")


@pytest.fixture(scope="module")
def small_net():
    """Two scales of one pass: the exporter needs minutes for the whole network."""
    torch.manual_seed(0)
    return build(8, (1, 1, 1), passes=(0, 1, 1), inr="first")


@pytest.fixture(scope="module")
def weights(small_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save_checkpoint(path, state_dict=small_net.state_dict(), options=small_net.options)
    return str(path)


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """The command's files, in float32 for any size and in float16 for one."""
    folder = tmp_path_factory.mktemp("onnx")
    pictures = str(make_pairs(folder / "pairs", count=2, size=(40, 300)) / "input")
    for name, options in (("any.onnx", []), ("half.onnx", ["--float16", "--size", "48", "64"])):
        export.main(["--weights", weights, "--output", str(folder / name), "--pictures", pictures, *options])
    return folder


def test_exported_networks_give_the_same_pictures(exported, small_net):
    session = onnxruntime.InferenceSession(exported / "any.onnx")
    half = onnxruntime.InferenceSession(exported / "half.onnx")
    for shape in ((1, 3, 16, 16), (3, 3, 64, 32), (1, 3, 48, 64)):
        x = torch.rand(shape)
        with torch.inference_mode():
            expected = small_net(x)[0].numpy()
        np.testing.assert_allclose(session.run(None, {"rainy": x.numpy()})[0], expected, rtol=0, atol=1e-5)
    difference = np.abs(half.run(None, {"rainy": x.numpy()})[0] - expected).max()
    assert 1e-6 < difference < export.LIMITS["float16"]
    assert half.get_inputs()[0].shape == [1, 3, 48, 64]
    assert [output.name for output in session.get_outputs()] == ["derained"]


@pytest.mark.slow
def test_the_whole_network_can_be_exported(narrow_weights, tmp_path, capsys):
    export.main(["--weights", str(narrow_weights), "--output", str(tmp_path / "narrow.onnx")])
    assert "narrow.onnx differs from PyTorch by at most" in capsys.readouterr().out


def test_the_example_derains_8_bit_pictures(exported, small_net, tmp_path):
    def run(name):
        command = ["docs/onnx_example.py", exported / "any.onnx", tmp_path / name, tmp_path / "derained.png"]
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)

    picture = random_picture(50, 70)
    write_png(tmp_path / "rainy.png", picture)
    assert run("rainy.png").returncode == 0
    expected = Derainer(small_net, "whole")(picture)
    assert np.abs(read_image(tmp_path / "derained.png").astype(int) - expected).max() <= 1
    write_picture(tmp_path / "deep.png", Picture(np.zeros((16, 16, 3), np.uint16), grey=True))
    refused = run("deep.png")
    assert refused.returncode == 1 and "deep.png has more than 8 bits" in refused.stderr


def test_an_export_that_differs_fails(exported, weights, tmp_path, monkeypatch):
    other = onnx.load(exported / "any.onnx")
    bias = next(tensor for tensor in other.graph.initializer if tensor.dims == [8])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    monkeypatch.setattr(export, "to_onnx", lambda *_: other)
    pictures = str(make_pairs(tmp_path, count=1, size=(16, 16)) / "input")
    (tmp_path / "a.onnx").write_text("of an earlier export")
    with pytest.raises(SystemExit, match=r"differ from PyTorch's by .*a\.onnx was not written"):
        export.main(["--weights", weights, "--output", str(tmp_path / "a.onnx"), "--pictures", pictures])
    assert (tmp_path / "a.onnx").read_text() == "of an earlier export"


def test_what_cannot_be_used_is_named_before_the_export(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", None)
    pictures = make_pairs(tmp_path / "pairs", count=2, size=(16, 16)) / "input"
    (pictures / "1.png").write_bytes(b"broken")
    options = ["--weights", weights, "--pictures", str(pictures), "--output"]
    for output, message in ((tmp_path, "is a folder: give --output a file"), (tmp_path / "a.onnx", "1.png cannot be")):
        with pytest.raises(SystemExit, match=message):
            export.main([*options, str(output)])
    monkeypatch.setattr(export, "onnxruntime", None)
    with pytest.raises(SystemExit, match=r"onnxruntime: pip install -r requirements-extras\.txt"):
        export.main([*options, str(tmp_path / "a.onnx")])
