import multiprocessing.dummy
from unittest.mock import Mock

import torch

from evaluations import complexity
from tests.conftest import NARROW, ROOT


def test_multiply_adds_are_counted_from_shapes(monkeypatch):
    monkeypatch.setattr(complexity, "build", lambda **options: torch.nn.Conv2d(3, 3, 3, padding=1))
    assert complexity.size_of({}) == (3 * 3 * 9 + 3, 256 * 256 * 3 * 3 * 9)


def test_the_documented_sizes_are_those_of_the_networks():
    documented = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, options in complexity.NETWORKS.items():
        parameters, multiply_adds = complexity.size_of(options)
        assert f"| {name} | {parameters / 1e6:.2f} | {multiply_adds / 1e9:.2f} |" in documented


def test_the_command_prints_a_line_for_each_network(monkeypatch, capsys):
    monkeypatch.setattr(complexity, "REPEATS", 1)
    monkeypatch.setattr(complexity, "NETWORKS", {"narrow": NARROW})
    monkeypatch.setattr(complexity, "get_context", lambda method: multiprocessing.dummy)  # threads start sooner
    monkeypatch.setattr(complexity, "peak_memory", Mock(side_effect=[100, 130]))
    complexity.main(["--gpus", "cpu"])
    line = capsys.readouterr().out.splitlines()[2]
    name, parameters, multiply_adds, seconds, memory = line.strip("| ").split(" | ")
    assert (name, parameters, memory) == ("narrow", "0.73", "30") and float(multiply_adds) > 0 and float(seconds) > 0
