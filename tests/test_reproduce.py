import csv
import shutil

import numpy as np
import pytest
import torch

from evaluations import reproduce
from evaluations.metrics import psnr_ssim
from evaluations.reproduce import SETS, as_latex, as_markdown, paper_scores, table_row
from tests.conftest import make_pairs, save_narrow
from utils import weights
from utils.pairs import DATASETS, find_pairs
from utils.pictures import read_image, write_picture


@pytest.fixture
def toy(tmp_path, narrow_is_published, monkeypatch):
    """A toy copy of the five sets, with two pictures each, and a mirror with weights of a narrow NeRD-Rain-S."""
    for seed, name in enumerate(SETS):
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(test_pairs=2))
        make_pairs(tmp_path / "data_dir" / name / "test", count=2, seed=seed)
        save_narrow(tmp_path / "mirror" / "NeRD-Rain-S" / f"{name}.pth")
    return tmp_path


def run(toy, *datasets):
    """-> dict of (data set, method) -> row of the table, the Markdown, what the command said at its end."""
    arguments, message = ["--gpus", "cpu", "--models", "NeRD-Rain-S", "--datasets", *(datasets or SETS)], ""
    for option in ("data_dir", "results_dir", "mirror", "output"):
        arguments += [f"--{option}", str(toy / option)]
    try:
        reproduce.main(arguments)
    except SystemExit as error:
        message = str(error.code)
    with open(toy / "output.csv", newline="") as file:
        rows = {(row["dataset"], row["method"]): row for row in csv.DictReader(file)}
    return rows, (toy / "output.md").read_text(), message


def test_the_table_is_made_from_weights(toy):
    rows, text, message = run(toy, "Rain200L", "DID-Data")
    assert not message and "Missing" not in text
    for name, protocol in (("Rain200L", "rain200"), ("DID-Data", "did")):
        row, results = rows[name, "NeRD-Rain-S"], toy / "results_dir" / "NeRD-Rain-S" / name
        pairs = find_pairs(toy / "data_dir" / name / "test")
        scores = [psnr_ssim(read_image(results / p.input.name), read_image(p.target), protocol) for p in pairs]
        assert (float(row["psnr"]), float(row["ssim"])) == pytest.approx(tuple(np.mean(scores, axis=0)))
        assert float(row["psnr_difference"]) == pytest.approx(float(row["psnr"]) - float(row["paper_psnr"]))
        assert (row["pictures"], row["protocol"]) == ("2", protocol)
    assert len((toy / "output.tex").read_text().splitlines()) == 2 * (16 + 3) + 5


def test_results_are_made_again_only_if_they_are_missing_or_of_other_weights(toy):
    first = run(toy, "Rain200L")[0]["Rain200L", "NeRD-Rain-S"]
    folder = toy / "results_dir/NeRD-Rain-S/Rain200L"
    (folder / "1.png").unlink()
    kept = (folder / "0.png").stat().st_mtime_ns
    assert run(toy, "Rain200L")[0]["Rain200L", "NeRD-Rain-S"] == first
    assert (folder / "0.png").stat().st_mtime_ns == kept
    path = save_narrow(toy / "released/NeRD-Rain-S/Rain200L.pth", seed=1)
    rows, _, message = run(toy, "Rain200L")
    assert not message and rows["Rain200L", "NeRD-Rain-S"]["psnr"] != first["psnr"]
    path.write_bytes(b"damaged")
    rows, _, message = run(toy, "Rain200L")  # whose results these are cannot be told any more
    assert "cannot be read as a checkpoint" in message and rows["Rain200L", "NeRD-Rain-S"]["psnr"] == ""


def test_pictures_of_other_origin_are_measured_as_they_are(toy, capsys):
    for method in ("Mine", "Restormer", "NeRD-Rain-S"):
        shutil.copytree(toy / "data_dir/Rain200L/test/input", toy / "results_dir" / method / "Rain200L")
    shutil.rmtree(toy / "mirror")
    rows, text, message = run(toy, "Rain200L", "SPA-Data")
    assert "NeRD-Rain-S/Rain200L has no settings.json" in capsys.readouterr().out
    scores = {rows["Rain200L", name]["psnr"] for name in ("Mine", "Restormer", "NeRD-Rain-S")}
    assert len(scores) == 1 and rows["Rain200L", "Mine"]["paper_psnr"] == ""
    assert "2 of 2 |" in text and "not measured" in text
    assert "Rain200L" not in message
    assert "SPA-Data was not derained: the weights NeRD-Rain-S/SPA-Data cannot be loaded" in message
    downloads = text.partition("### Could be measured, too")[2]
    assert "IDT on Rain200L: download its pictures from https://pan.baidu.com/s/1jhHCHT64aDknc4g0ELZJGA" in downloads
    assert "Restormer on SPA-Data" in downloads and "Restormer on Rain200L" not in downloads


def test_what_is_missing_is_listed_and_the_rest_is_measured(toy):
    shutil.rmtree(toy / "data_dir/DID-Data")
    shutil.rmtree(toy / "data_dir/DDN-Data/test/input")
    (toy / "data_dir/SPA-Data/test/input/1.png").write_bytes(b"broken")
    shutil.copytree(toy / "data_dir/Rain200L/test/input", toy / "results_dir/Restormer/Rain200L")
    (toy / "results_dir/Restormer/Rain200L/1.png").unlink()
    rows, text, message = run(toy)
    missing = text.partition("### Missing")[2]
    assert "the table was written, but not everything could be measured" in message
    assert "pan.baidu.com/s/1aPFJExxxTBOzJjngMAOQDA (code 5luo)" in missing
    assert "DDN-Data/test/input does not exist" in missing
    assert "Restormer on Rain200L is not complete" in missing and "1 of the 2 pictures of Rain200L can be" in missing
    assert "SPA-Data/test/input/1.png" in missing and rows["SPA-Data", "NeRD-Rain-S"]["pictures"] == "1"
    measured = {name: rows[name, "NeRD-Rain-S"]["psnr"] != "" for name in SETS}
    assert measured == {name: name not in ("DID-Data", "DDN-Data") for name in SETS}
    assert rows["DID-Data", "NeRD-Rain-S"]["paper_psnr"] == "35.36" and "| Restormer |" in text and "1 of 2 |" in text


def test_what_fails_in_one_set_does_not_lose_the_others(toy, monkeypatch):
    errors = {"DID-Data": OSError("no space"), "SPA-Data": torch.OutOfMemoryError("too small")}

    def write_or_fail(path, picture, quality):
        if path.parent.name in errors:
            raise errors[path.parent.name]
        write_picture(path, picture, quality)

    monkeypatch.setattr("utils.derain.write_picture", write_or_fail)
    rows, _, message = run(toy, "DID-Data", "SPA-Data", "Rain200L")
    for name, error in errors.items():
        assert f"NeRD-Rain-S on {name} was not derained: {error}" in message and not rows[name, "NeRD-Rain-S"]["psnr"]
    assert rows["Rain200L", "NeRD-Rain-S"]["psnr"]


def test_facts_are_complete():
    assert all(len(paper_scores(name)) == 16 for name in SETS)
    assert paper_scores("Rain200L")["NeRD-Rain"] == (41.71, 0.9903)
    assert set(weights.released_weights()) >= {(model, name) for model in reproduce.MODELS for name in SETS}


def test_tables_mark_what_is_the_papers_and_what_is_incomplete():
    rows = [
        table_row("Rain200L", "A_b", (41.0, 0.99), (40.5, 0.98), 200),
        table_row("Rain200L", "C", None, (39, 0.97)),
        table_row("Rain200L", "D", (41.0, 0.99), None, 7),
    ]
    text, lines = as_markdown({"Rain200L": rows}, ["x\ny"]), as_latex({"Rain200L": rows}).splitlines()
    assert "| A_b | 41.00 | 40.50 | +0.50 | 0.9900 | 0.9800 | +0.0100 | 200 of 200 |" in text
    assert "| C | – | 39.00 | – | – | 0.9700 | – | not measured |" in text
    assert "| D | 41.00 | – | – | 0.9900 | – | – | 7 of 200 |" in text and "- x\n  y\n" in text
    assert r"A\_b & 41.00 & 40.50 & +0.50 & 0.9900 & 0.9800 & +0.0100 & 200 of 200 \\" in lines
    assert r"C & -- & 39.00 & -- & -- & 0.9700 & -- & not measured \\" in lines
