import multiprocessing.dummy

import torch

from evaluations import complexity


def test_multiply_adds_are_counted_from_shapes(monkeypatch):
    monkeypatch.setattr(complexity, "build", lambda **options: torch.nn.Conv2d(3, 3, 3, padding=1))
    assert complexity.size_of({}) == (3 * 3 * 9 + 3, 256 * 256 * 3 * 3 * 9)


def test_the_command_prints_a_line_for_each_network(monkeypatch, capsys):
    monkeypatch.setattr(complexity, "REPEATS", 1)
    monkeypatch.setattr(complexity, "NETWORKS", {"narrow": {"dim": 8, "num_blocks": (1, 1, 1)}})
    monkeypatch.setattr(complexity, "get_context", lambda method: multiprocessing.dummy)  # threads start sooner
    complexity.main(["--gpus", "cpu"])
    line = capsys.readouterr().out.splitlines()[2]
    name, parameters, multiply_adds, seconds, memory = line.strip("| ").split(" | ")
    assert (name, parameters) == ("narrow", "0.73") and float(multiply_adds) > 0 and float(seconds) > 0
    assert not float(memory) < 0  # 0 in a process that has already held more, NaN if not on Linux
