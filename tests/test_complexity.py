import torch

from evaluations import complexity
from tests.conftest import ROOT


def test_multiply_adds_are_counted_from_shapes(monkeypatch):
    monkeypatch.setattr(complexity, "build", lambda **options: torch.nn.Conv2d(3, 3, 3, padding=1))
    assert complexity.size_of({}) == (3 * 3 * 9 + 3, 256 * 256 * 3 * 3 * 9)


def test_the_documented_sizes_are_those_of_the_networks(capsys):
    documented = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    complexity.main([])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3 and all(line.rstrip("|") in documented for line in lines)
