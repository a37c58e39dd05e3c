import re

import pytest
import torch

import model
from evaluations import complexity
from tests.golden import NUMBERS


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(model, "nerd_rain_s", lambda: model.MultiscaleNet(8, (1, 1, 1)))


def test_the_command_prints_the_published_size(capsys):
    complexity.main(["--networks", "nerd_rain_s", "--size", "16", "16", "--repeats", "1", "--gpus", "cpu"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "NeRD-Rain-S" in line)
    parameters, multiply_adds, seconds, memory = (float(cell) for cell in line.split("|")[2:-1])
    assert parameters == round(NUMBERS["nerd_rain_s"]["parameters"] / 1e6, 2)
    assert multiply_adds > 0 and seconds > 0 and memory >= 0


def test_multiply_adds_grow_with_the_windows(narrow):
    cpu = torch.device("cpu")
    found = [complexity.measure("nerd_rain_s", *size, cpu, 1)["multiply_adds"] for size in ((256, 256), (256, 512))]
    assert found[1] == 2 * found[0]


def test_wrong_sizes_are_refused():
    with pytest.raises(SystemExit) as caught:
        complexity.main(["--size", "0", "16"])
    assert re.search("at least 1", str(caught.value.code))
