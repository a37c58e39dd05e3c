import json

import numpy as np
import pytest
import torch

from benchmarks import common, inference, loader, pictures, pipeline, seams, sizes, training
from dataset_RGB import Photo
from model import MultiscaleNet
from utils.images import write_png
from utils.inference import Derainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    """Benchmarks run on a narrow network and small windows, and write elsewhere."""

    def narrow_network(name):
        torch.manual_seed(0)
        return MultiscaleNet(8, (1, 1, 1))

    for module in (inference, loader, pictures, pipeline, training):
        monkeypatch.setattr(module, "golden_network", narrow_network)
    monkeypatch.setattr(inference, "SIDE", 32)
    monkeypatch.setattr(common, "RESULTS", tmp_path)


def test_inference_compares_outputs_and_times(tmp_path):
    rows = inference.compare("nerd_rain_s", CPU, repeats=1)
    assert [row["variant"] for row in rows] == ["published formulation, float32", "ours, float32", "ours, bfloat16"]
    assert rows[0]["times as fast"] == 1 and all(row["seconds"] > 0 for row in rows)
    assert rows[0]["largest difference"] == 0 < rows[1]["largest difference"] < 1e-5 < rows[2]["largest difference"]
    common.report("inference", rows, CPU, repeats=1)
    written = json.loads((tmp_path / "inference_cpu.json").read_text())
    assert written["rows"] == rows and written["facts"]["torch"] == torch.__version__


def test_inference_refuses_other_outputs(monkeypatch):
    monkeypatch.setattr(inference, "TOLERANCE", 1e-12)
    with pytest.raises(AssertionError, match="outputs differ"):
        inference.compare("nerd_rain_s", CPU, repeats=1)


def test_training_compares_losses_and_times():
    rows = training.compare("nerd_rain_s", 1, 32, CPU, repeats=1)
    losses = [row["loss in step 3"] for row in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2:] == pytest.approx([losses[0]] * 2, rel=0.05)
    memory = [row["MiB kept"] for row in rows]
    assert memory[0] > memory[1] > memory[2] > 2 * memory[3] > 0


def test_pictures_are_compared_and_timed():
    rows = pictures.compare("nerd_rain_s", CPU, repeats=1, count=1)
    assert [row["variant"] for row in rows] == ["published formulation, float32", "ours, float32", "ours, bfloat16"]
    assert all(row["pictures per second"] > 0 for row in rows) and rows[1]["PSNR to the first"] > 80


def test_the_pipeline_is_taken_apart(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        write_png(path, np.zeros((20, 30, 3), np.uint8))
    files, network = pipeline.shares(Derainer(pipeline.golden_network("nerd_rain_s")), paths, repeats=1)
    assert files > 0 and network > 0 and len(list((tmp_path / "out").iterdir())) == 2


def test_the_loader_is_set_against_the_step(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((60, 60, 3), np.uint8))
    assert loader.patches_per_second([Photo(tmp_path / "a.png")], 32, seconds=0.1) > 0
    assert loader.step_seconds("nerd_rain_s", 1, 32, CPU, repeats=1) > 0


def test_the_median_of_second_runs_counts(monkeypatch):
    moments = iter([0, 9, 10, 11, 0, 9, 10, 13, 0, 9, 10, 12])  # 9 and 1, 9 and 3, 9 and 2 seconds
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(moments))
    assert common.seconds_of({"a": lambda: None}, 3, CPU) == {"a": 2}


def test_a_size_is_measured(monkeypatch):
    monkeypatch.setattr(sizes.model, "nerd_rain_s", lambda: MultiscaleNet(8, (1, 1, 1)))
    seconds, memory = sizes.derain_once("nerd_rain_s", 300, "cpu")
    assert seconds > 0 and memory >= 0


def test_windows_that_shift_colours_leave_seams_and_tiles_do_not():
    class Shifting(torch.nn.Linear):  # channel attention, too, makes results depend on all of a window
        def forward(self, x):
            return [x + 0.3 * x.mean(dim=(1, 2, 3), keepdim=True)]

    slope = np.broadcast_to(np.linspace(0, 0.6, 200, dtype=np.float32)[:, None, None], (200, 160, 3))
    window, tile = seams.compare(Shifting(1, 1), [slope], 64)
    assert window["steps where they meet"] > 5 * tile["steps where they meet"] > 0
    assert window["ratio"] > 100


def test_windows_meet_and_tiles_overlap_where_they_should():
    assert np.flatnonzero(seams.meeting_places("window", 150, 64)).tolist() == [63, 127]
    assert np.flatnonzero(seams.meeting_places("tile", 120, 64)).tolist() == list(range(55, 64))
