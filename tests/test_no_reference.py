import csv
import sys
import types

import numpy as np
import pytest

from evaluations import no_reference
from utils.images import write_png


@pytest.fixture
def results(tmp_path):
    for name, level in (("a", 10), ("sub/b", 30)):
        write_png(tmp_path / f"{name}.png", np.full((20, 24, 3), (level, 7, 9), np.uint8))
    return tmp_path


@pytest.fixture
def pyiqa(monkeypatch):
    """Stands in for the library: a metric is the picture's mean red, and refuses black pictures."""

    def metric(picture):
        assert picture.shape[1] == 3 and 0 < picture.mean() <= 1, "unusable"
        return (picture[:, 0].mean()[None] * 255).round()

    module = types.SimpleNamespace(create_metric=lambda name, device: metric)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return module


def failure(*arguments):
    with pytest.raises(SystemExit) as caught:
        no_reference.main([str(argument) for argument in arguments])
    return str(caught.value.code)


def test_scores_are_printed_and_written(results, pyiqa, capsys):
    no_reference.main(["--results", str(results), "--gpus", "cpu"])
    printed = capsys.readouterr().out
    assert "2 of 2 pictures" in printed and "20.0000" in printed
    with open(results / "no_reference.csv", newline="") as file:
        rows = {row["picture"]: float(row["niqe"]) for row in csv.DictReader(file)}
    assert rows == pytest.approx({"a.png": 10, "sub/b.png": 30})


def test_pictures_that_cannot_be_measured_are_named(results, pyiqa):
    write_png(results / "black.png", np.zeros((20, 24, 3), np.uint8))
    (results / "broken.png").write_bytes(b"broken")
    message = failure("--results", results)
    assert "2 pictures could not be measured" in message and "black.png: unusable" in message
    assert "broken.png cannot be read" in message
    assert (results / "no_reference.csv").read_text().splitlines()[1:] == ["a.png,10.0,10.0", "sub/b.png,30.0,30.0"]


def test_the_library_and_its_parameters_are_missed(results, pyiqa, monkeypatch):
    def offline(name, device):
        raise OSError("no route to host")

    pyiqa.create_metric = offline
    assert "could not fetch the parameters" in failure("--results", results)
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    assert "pip install pyiqa" in failure("--results", results)
