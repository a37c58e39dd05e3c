import re

import pytest
import torch

import model
from evaluations import complexity
from tests.golden import NUMBERS
from utils.checkpoint import DEFAULTS


class OneConvolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.options = {"dim": 0, "num_blocks": (), "heads": None, **DEFAULTS}
        self.convolution = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, picture):
        return [self.convolution(picture)]


def test_the_command_prints_the_published_size(capsys):
    complexity.main(["--networks", "nerd_rain_s", "--size", "128", "128", "--repeats", "1", "--gpus", "cpu"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "NeRD-Rain-S" in line)
    parameters, multiply_adds, seconds, memory = (float(cell) for cell in line.split("|")[2:-1])
    assert parameters == round(NUMBERS["nerd_rain_s"]["parameters"] / 1e6, 2)
    assert 10 < multiply_adds < 30 and seconds > 0 and 20 < memory < 1000


@pytest.mark.parametrize("width, windows", [(256, 1), (512, 2)])
def test_multiply_adds_are_those_of_the_windows(monkeypatch, width, windows):
    monkeypatch.setattr(model, "nerd_rain_s", OneConvolution)
    found = complexity.measure("nerd_rain_s", 256, width, "cpu", 1)
    assert found["multiply_adds"] == windows * 256 * 256 * 3 * 3 * 3 * 3
    assert found["parameters"] == 84


def test_the_time_is_the_median(monkeypatch):
    monkeypatch.setattr(model, "nerd_rain_s", OneConvolution)
    moments = iter([0, 1, 10, 12, 20, 29])  # pictures that take 1, 2 and 9 seconds
    monkeypatch.setattr(complexity.time, "perf_counter", lambda: next(moments))
    assert complexity.measure("nerd_rain_s", 16, 16, "cpu", 3)["seconds"] == 2


def test_wrong_sizes_are_refused():
    with pytest.raises(SystemExit) as caught:
        complexity.main(["--size", "0", "16"])
    assert re.search("at least 1", str(caught.value.code))
