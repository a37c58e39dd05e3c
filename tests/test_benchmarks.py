import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import common, gpu, inference, seams, training
from tests.conftest import failure
from utils.files import UserError


@pytest.fixture
def quick(tmp_path):
    return ["--gpus", "cpu", "--quick", "--output", str(tmp_path)]


def test_everything_for_a_gpu_is_measured_beside_the_published_formulation(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LAST_START", float("inf"))  # on a busy machine, too
    assert failure(gpu.main, quick) == "0"
    written = json.loads((tmp_path / "gpu_cpu.json").read_text())
    rows = written["rows"]
    assert written["facts"]["torch"] == torch.__version__ and written["facts"]["cores"] >= 1
    baseline, ours = common.BASELINE, ["float32", "bfloat16"]
    layouts = [f"{dtype}, {layout}" for dtype in ours for layout in ("contiguous_format", "channels_last")]
    assert [(row["network"], row["task"], row["variant"]) for row in rows] == [
        *[("depthwise convolution", "8 channels, 32²", variant) for variant in layouts],
        *[("NeRD-Rain", "training 1 × 32²", variant) for variant in (f"{baseline}, batch 1", *ours)],
        *[("NeRD-Rain", "deraining 56×40", variant) for variant in (baseline, *ours)],
        *[("NeRD-Rain-S", "deraining 56×40", variant) for variant in (baseline, *ours)],
        *[("NeRD-Rain", "training 2 × 32²", f"{baseline}, batch {batch}") for batch in (2, 1)],
        ("NeRD-Rain", "training 2 × 32²", "bfloat16"),
    ]
    for row in rows:
        least, most = (40, 90) if row["variant"].startswith("bfloat16") else (90, 200)
        assert least <= row["PSNR between outputs"] <= most
        speed = row["pictures a second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
    assert common.as_markdown(rows) in capsys.readouterr().out


def test_parts_that_fail_do_not_lose_the_others_and_none_begins_too_late(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.training, "compare", None)
    monkeypatch.setattr(gpu.inference, "compare", lambda name, *args: [{"network": name}])
    monkeypatch.setattr(gpu, "compare_layouts", lambda *args: [{"network": "layer"}])
    assert "2 parts failed" in failure(gpu.main, quick)
    assert "'NoneType' object is not callable" in capsys.readouterr().err
    rows = json.loads((tmp_path / "gpu_cpu.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["layer", "NeRD-Rain", "NeRD-Rain-S"]
    monkeypatch.setattr(gpu, "LAST_START", -1)
    failure(gpu.main, quick)
    assert capsys.readouterr().out == "the time is up: the other parts are omitted\n"


def test_compiled_networks_are_compared_too(quick, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: asked.append(options) or net)
    args, compiled = common.parse_args("", quick), ["bfloat16, compiled"]
    rows = training.compare("NeRD-Rain", args, 1, 32, compiled) + inference.compare("NeRD-Rain", args, 1, compiled)
    assert [row["variant"] for row in rows[1::2]] == compiled * 2 and len(rows) == 4 and len(asked) == 2


def test_the_loader_is_measured_beside_the_training(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOADING_BATCHES", 1)
    training.main(quick)
    loader = json.loads((tmp_path / "training_cpu.json").read_text())["facts"]["loader"]
    assert [row["source"] for row in loader] == ["pairs", "synthetic rain"]
    assert all(row["patches a second"] > 0 for row in loader)


def test_variants_alternate_and_those_that_do_not_fit_are_omitted(quick, capsys):
    args, calls = common.parse_args("", quick), []
    args.rounds = 3

    def build(name):
        if name == "large":
            raise torch.OutOfMemoryError
        return lambda: calls.append(name) or torch.zeros(1), 1

    runs = common.run_rounds({name: partial(build, name) for name in ("a", "large", "b")}, args)
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3] and [len(run.seconds) for run in runs.values()] == [3, 3]
    assert "large does not fit" in capsys.readouterr().out


def test_ratios_are_those_of_the_same_round_and_other_outputs_are_refused():
    zeros = torch.zeros(4)
    runs = {"a": common.Run(None, 1, zeros, None, [2, 4, 1]), "b": common.Run(None, 2, zeros, None, [1, 2, 2])}
    _, row = common.as_rows(runs, network="x")
    assert row["times as fast"] == {"min": 1, "median": 4, "max": 4}
    assert row["pictures a second"] == {"min": 1, "median": 1, "max": 2} and row["network"] == "x"
    runs["b"] = runs["b"]._replace(output=zeros + 0.1)
    with pytest.raises(UserError, match=r"b computes something else than a: 20\.0 dB"):
        common.as_rows(runs)


def test_windows_that_shift_colours_leave_seams_and_tiles_do_not():
    net = torch.nn.Linear(1, 1)
    net.forward = lambda x: [x + 0.3 * x.mean(dim=(1, 2, 3), keepdim=True)]  # depends on all of a window
    slope = np.broadcast_to(np.linspace(0, 0.6, 200, dtype=np.float32)[:, None, None], (200, 160, 3))
    found = seams.compare(net, [slope], 64)
    assert found["window"][0] > 5 * found["tile"][0] > 0 and found["window"][0] > 100 * found["window"][1]
