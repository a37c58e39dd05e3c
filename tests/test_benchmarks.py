import json

import pytest
import torch

from benchmarks import common, inference, sizes, training
from model import MultiscaleNet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    """Benchmarks run on a narrow network and small windows, and write elsewhere."""

    def narrow_network(name):
        torch.manual_seed(0)
        return MultiscaleNet(8, (1, 1, 1))

    for module in (inference, training):
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
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=0.05)


def test_the_median_of_second_runs_counts(monkeypatch):
    moments = iter([0, 9, 10, 11, 0, 9, 10, 13, 0, 9, 10, 12])  # 9 and 1, 9 and 3, 9 and 2 seconds
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(moments))
    assert common.seconds_of({"a": lambda: None}, 3, CPU) == {"a": 2}


def test_a_size_is_measured(monkeypatch):
    monkeypatch.setattr(sizes.model, "nerd_rain_s", lambda: MultiscaleNet(8, (1, 1, 1)))
    seconds, memory = sizes.derain_once("nerd_rain_s", 300, "cpu")
    assert seconds > 0 and memory >= 0
