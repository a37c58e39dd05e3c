import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_RGB import DATASETS
from evaluations import figure, reproduce
from evaluations.metrics import psnr_ssim
from evaluations.table import COLUMNS, SETS, Row, Score, as_csv, as_latex, as_markdown, paper_scores, read_facts
from tests.conftest import make_pairs
from utils import checkpoint, download
from utils.checkpoint import load_network
from utils.formats import write_picture
from utils.images import read_image, write_png
from utils.inference import Derainer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toy(tmp_path, narrow_weights, monkeypatch):
    """A toy copy of the five sets, with two pictures each, and a mirror with weights of a narrow NeRD-Rain-S."""
    monkeypatch.setitem(checkpoint.PUBLISHED, (8, (1, 1, 1), (1, 2, 4)), "NeRD-Rain-S")
    for seed, name in enumerate(SETS):
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(test_pairs=2))
        make_pairs(tmp_path / "Datasets" / name / "test", count=2, seed=seed)
        weights = tmp_path / "mirror" / "NeRD-Rain-S" / f"{name}.pth"
        weights.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(narrow_weights, weights)
    return tmp_path


def run(toy, *options, models=("NeRD-Rain-S",)):
    """-> dict of (data set, method) -> row of the table, the Markdown, what the command said at its end."""
    folders = {"data_dir": "Datasets", "results_dir": "results", "checkpoints_dir": "weights", "mirror": "mirror"}
    arguments = [text for name, folder in folders.items() for text in (f"--{name}", str(toy / folder))]
    message = ""
    try:
        reproduce.main([*arguments, "--output", str(toy / "out" / "table"), "--models", *models, *options])
    except SystemExit as error:
        message = str(error.code)
    with open(toy / "out" / "table.csv", newline="") as file:
        rows = {(row["dataset"], row["method"]): row for row in csv.DictReader(file)}
    return rows, (toy / "out" / "table.md").read_text(), message


def test_the_table_is_made_from_weights(toy, narrow_weights):
    rows, text, message = run(toy)
    assert not message and "Missing" not in text
    for name in SETS:
        row = rows[name, "NeRD-Rain-S"]
        protocol = "did" if name in ("DID-Data", "DDN-Data") else "rain200"
        test = toy / "Datasets" / name / "test"
        net = load_network(narrow_weights)
        scores = []
        for path in sorted((test / "input").iterdir()):
            result = read_image(toy / "results" / "NeRD-Rain-S" / name / path.name)
            difference = np.abs(result.astype(int) - Derainer(net)(read_image(path)))
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
            scores.append(psnr_ssim(result, read_image(test / "target" / path.name), protocol))
        assert (float(row["psnr"]), float(row["ssim"])) == pytest.approx(tuple(np.mean(scores, axis=0)))
        assert float(row["psnr_difference"]) == pytest.approx(float(row["psnr"]) - float(row["paper_psnr"]))
        assert (row["pictures"], row["protocol"]) == ("2", protocol)
        assert (toy / "weights" / "NeRD-Rain-S" / f"{name}.pth").read_bytes() == narrow_weights.read_bytes()
    assert rows["SPA-Data", "NeRD-Rain"]["paper_psnr"] == "49.58" and rows["SPA-Data", "NeRD-Rain"]["psnr"] == ""
    assert len((toy / "out" / "table.tex").read_text().splitlines()) == 5 * (16 + 3) + 5


def test_results_that_are_there_are_measured_and_not_made_again(toy):
    for name in ("Mine", "Restormer"):
        shutil.copytree(toy / "Datasets" / "Rain200L" / "test" / "input", toy / "results" / name / "Rain200L")
    derained = toy / "results" / "NeRD-Rain-S" / "Rain200L"
    shutil.copytree(toy / "Datasets" / "Rain200L" / "test" / "input", derained)
    shutil.rmtree(toy / "mirror")
    rows, text, message = run(toy, "--datasets", "Rain200L")
    assert not message and not (toy / "weights").exists()
    scores = {rows["Rain200L", name]["psnr"] for name in ("Mine", "Restormer", "NeRD-Rain-S")}
    assert len(scores) == 1 and rows["Rain200L", "Mine"]["paper_psnr"] == ""
    assert "2 of 2 |" in text and "only the paper's number" in text


def test_an_interrupted_set_is_completed(toy):
    run(toy, "--datasets", "Rain200L")
    folder = toy / "results" / "NeRD-Rain-S" / "Rain200L"
    (folder / "1.png").unlink()
    kept = (folder / "0.png").stat().st_mtime_ns
    rows, _, message = run(toy, "--datasets", "Rain200L")
    assert not message and rows["Rain200L", "NeRD-Rain-S"]["pictures"] == "2"
    assert (folder / "0.png").stat().st_mtime_ns == kept


def test_a_missing_set_is_listed_and_the_others_are_measured(toy):
    shutil.rmtree(toy / "Datasets" / "DID-Data")
    rows, text, message = run(toy)
    assert "DID-Data" in message
    assert "pan.baidu.com/s/1aPFJExxxTBOzJjngMAOQDA (code 5luo)" in text.partition("### Missing")[2]
    assert "Datasets/DID-Data/test/input" in text
    assert rows["DID-Data", "NeRD-Rain-S"]["psnr"] == "" and rows["DID-Data", "NeRD-Rain-S"]["paper_psnr"] == "35.36"
    assert all(rows[name, "NeRD-Rain-S"]["psnr"] for name in SETS if name != "DID-Data")


def test_missing_and_wrong_weights_are_listed_with_where_to_put_them(toy):
    (toy / "mirror" / "NeRD-Rain").mkdir()
    shutil.copy(toy / "mirror" / "NeRD-Rain-S" / "Rain200L.pth", toy / "mirror" / "NeRD-Rain" / "Rain200L.pth")
    rows, text, message = run(
        toy,
        "--datasets",
        "Rain200L",
        "Rain200H",
        models=("NeRD-Rain-S", "NeRD-Rain"),
    )
    assert "NeRD-Rain on Rain200H needs its weights" in message
    missing = text.partition("### Missing")[2]
    assert "holds NeRD-Rain-S, not NeRD-Rain" in missing and "does not exist" in missing
    assert "drive.google.com/file/d/1MOG3ZrXQxH-o13O1QWB6EiZhJsXOlUXs/view" in missing and "(code x45q)" in missing
    assert str(toy / "weights" / "NeRD-Rain" / "Rain200H.pth") in missing
    assert not list((toy / "weights" / "NeRD-Rain").iterdir())
    assert rows["Rain200H", "NeRD-Rain-S"]["psnr"]


def test_a_set_without_its_test_pictures_is_listed(toy):
    shutil.rmtree(toy / "Datasets" / "Rain200L" / "test" / "input")
    (toy / "Datasets" / "Rain200H" / "test").rename(toy / "Datasets" / "Rain200H" / "train")
    rows, text, _ = run(toy, "--datasets", "Rain200L", "Rain200H")
    missing = text.partition("### Missing")[2]
    assert "Rain200L/test/input is not there" in missing and "Rain200H/test/target is not there" in missing
    assert not any(row["psnr"] for row in rows.values())


@pytest.mark.parametrize("error", [OSError("no space"), torch.OutOfMemoryError("too small")])
def test_what_fails_in_one_set_does_not_lose_the_others(toy, monkeypatch, error):
    def fail_on_one(path, picture):
        if "DID-Data" in str(path):
            raise error
        write_picture(path, picture)

    monkeypatch.setattr(reproduce, "write_picture", fail_on_one)
    rows, text, message = run(toy)
    assert message and "### Missing" in text and not rows["DID-Data", "NeRD-Rain-S"]["psnr"]
    assert all(rows[name, "NeRD-Rain-S"]["psnr"] for name in SETS if name != "DID-Data")


def test_pictures_that_can_be_downloaded_are_named(toy):
    shutil.copytree(toy / "Datasets" / "Rain200L" / "test" / "input", toy / "results" / "Restormer" / "Rain200L")
    _, text, _ = run(toy, "--datasets", "Rain200L", "SPA-Data")
    more = text.partition("### Could be measured, too")[2]
    assert "IDT on Rain200L: its pictures from https://pan.baidu.com/s/1jhHCHT64aDknc4g0ELZJGA (code v4yd)" in more
    assert "Restormer on SPA-Data" in more and "Restormer on Rain200L" not in more and "Uformer" not in more


def test_results_that_are_the_clean_pictures_are_remarked_on(toy):
    shutil.copytree(toy / "Datasets" / "Rain200L" / "test" / "target", toy / "results" / "Mine" / "Rain200L")
    assert "identical to their clean pictures" in run(toy, "--datasets", "Rain200L")[1]


def test_weights_in_the_wrong_place_are_refused(toy):
    path = toy / "weights" / "NeRD-Rain" / "Rain200L.pth"
    path.parent.mkdir(parents=True)
    shutil.copy(toy / "mirror" / "NeRD-Rain-S" / "Rain200L.pth", path)
    _, text, _ = run(toy, "--datasets", "Rain200L", models=["NeRD-Rain"])
    assert f"{path} holds NeRD-Rain-S, not NeRD-Rain" in text and path.exists()


def test_incomplete_results_are_counted_and_listed(toy):
    shutil.copytree(toy / "Datasets" / "Rain200L" / "test" / "input", toy / "results" / "Restormer" / "Rain200L")
    (toy / "results" / "Restormer" / "Rain200L" / "1.png").unlink()
    (toy / "Datasets" / "Rain200L" / "test" / "input" / "1.png").write_bytes(b"broken")
    rows, text, message = run(toy, "--datasets", "Rain200L")
    assert "not all could be measured" in message
    assert rows["Rain200L", "Restormer"]["pictures"] == "1" and "1 of 2 |" in text
    missing = text.partition("### Missing")[2]
    assert "Restormer on Rain200L is not complete" in missing and "cannot be read" in missing
    assert "1 pictures were measured, Rain200L has 2" in missing


def test_google_drive_is_asked_without_a_mirror(toy, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "download", lambda url, path: asked.append(url))
    arguments = [
        "--data_dir",
        str(toy / "Datasets"),
        "--checkpoints_dir",
        str(toy / "weights"),
        "--datasets",
        "SPA-Data",
    ]
    with pytest.raises(SystemExit):
        reproduce.main([*arguments, "--results_dir", str(toy / "results"), "--output", str(toy / "table")])
    assert asked == [
        f"https://drive.google.com/uc?id={key}"
        for key in ("1oO5Q4ZDFF983uXL2isYzzdV3BwPXY0Ru", "1c3lLvRQACii_-9hJLA_J4mgZePWNXWLR")
    ]


def test_the_command_runs_as_written_where_nothing_is_there(tmp_path):
    options = [word for name in ("data", "results", "checkpoints") for word in (f"--{name}_dir", tmp_path / name)]
    command = [sys.executable, "evaluations/reproduce.py", *options, "--output", tmp_path / "table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "not all could be measured" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("pan.baidu.com") == 5
    assert "| NeRD-Rain | – | 41.71 |" in done.stdout


def test_facts_are_complete():
    paper = paper_scores()
    assert len(paper) == 5 * 16 and paper["Rain200L", "NeRD-Rain"] == Score(41.71, 0.9903)
    weights = read_facts("released_weights.csv")
    assert {(row["model"], row["dataset"]) for row in weights} >= {(m, s) for m in reproduce.MODELS for s in SETS}
    readme = (ROOT / "checkpoints" / "README.md").read_text()
    assert all(row["google_drive_file_id"] in readme and row["baidu_url"] in readme for row in weights)


def test_tables_mark_what_is_the_papers_and_what_is_incomplete():
    ours = Score(41.0, 0.99, 200)
    rows = [
        Row("Rain200L", "A_b", ours, Score(40.5, 0.98)),
        Row("Rain200L", "C", None, Score(39, 0.97)),
        Row("Rain200L", "D", ours._replace(pictures=7), None),
        Row("Rain200H", "A_b", None, Score(30, 0.9)),
    ]
    text = as_markdown(rows, ["x\ny"])
    assert "| A_b | 41.00 | 40.50 | +0.50 | 0.9900 | 0.9800 | +0.0100 | 200 of 200 |" in text
    assert "| C | – | 39.00 | – | – | 0.9700 | – | only the paper's number |" in text
    assert "7 of 200" in text and "- x\n  y\n" in text
    lines = as_latex(rows).splitlines()
    assert r"A\_b & 41.00 & 40.50 & +0.50 & 0.9900 & 0.9800 & +0.0100 & 200 of 200 \\" in lines
    assert r"A\_b & -- & 30.00 & -- & -- & 0.9000 & -- & only the paper's number \\" in lines
    assert {line.count("&") for line in lines if line.endswith(r"\\") and "multicolumn" not in line} == {7}
    assert dict(zip(COLUMNS, as_csv(rows)[0]))["ssim_difference"] == pytest.approx(0.01)


def test_the_figure_shows_all_methods(toy, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs the extra matplotlib")
    test = toy / "Datasets" / "Rain200L" / "test"
    for path in sorted((test / "input").iterdir()):  # rainy pictures of Rain200L have other names than clean ones
        path.rename(path.with_name(f"norain-{path.stem}x2.png"))
    for path in sorted((test / "target").iterdir()):
        path.rename(path.with_name(f"norain-{path.stem}.png"))
    shutil.copytree(test / "input", toy / "results" / "Restormer" / "Rain200L")
    shutil.copytree(test / "target", toy / "results" / "Mine" / "Rain200L")  # under the clean pictures' names
    write_png(toy / "results" / "Other" / "Rain200L" / "norain-0.png", read_image(test / "target" / "norain-0.png"))
    run(toy, "--datasets", "Rain200L", "--figure", "Rain200L/norain-0x2", "Rain200L/norain-1x2.png@2,3,20,10")
    assert "Other has no picture of Rain200L/norain-1x2" in capsys.readouterr().out
    choice = figure.parse_choice("Rain200L/norain-1x2@2,3,20,10")
    drawn = figure.draw_comparison([choice], toy / "Datasets", toy / "results")
    names = ["Rainy", "Restormer", "NeRD-Rain-S", "Mine", "Clean"]
    rainy, clean = read_image(test / "input" / "norain-1x2.png"), read_image(test / "target" / "norain-1.png")
    shown = [axes.images[0].get_array() for axes in drawn.axes]
    assert np.array_equal(shown[0], rainy) and np.array_equal(shown[1], rainy[3:13, 2:22])
    assert np.array_equal(shown[-2], clean) and np.array_equal(shown[-1], clean[3:13, 2:22])
    assert [axes.get_xlabel().partition("\n")[0] for axes in drawn.axes[1::2]] == names
    assert drawn.axes[1].get_xlabel().endswith("{:.2f} / {:.4f}".format(*psnr_ssim(rainy, clean, "rain200")))
    box = drawn.axes[0].patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (1.5, 2.5, 20, 10)
    sheet = read_image(toy / "out" / "table_figure.png")
    assert sheet.shape[1] > 1500 and sheet.std() > 20
    assert (toy / "out" / "table_figure.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("choice, message", [("Rain200L/9", "no picture named 9"), ("Rain200L/0@40,0,20,20", "inside")])
def test_a_figure_of_what_is_not_there_is_refused(toy, choice, message):
    pytest.importorskip("matplotlib", reason="the figure needs the extra matplotlib")
    assert message in run(toy, "--datasets", "Rain200L", "--figure", choice)[2]
    assert not (toy / "out" / "table_figure.png").exists()


def test_choices_of_pictures_are_checked():
    assert figure.parse_choice("Rain200L/a/b.png@1,2,3,4") == ("Rain200L", "a/b.png", (1, 2, 3, 4))
    for text in ("Rain200L", "Nothing/1"):
        with pytest.raises(argparse.ArgumentTypeError):
            figure.parse_choice(text)


def test_the_default_crop_is_where_the_rain_is():
    clean = np.zeros((60, 90, 3), np.uint8)
    rainy = clean.copy()
    rainy[35:50, 65:80] = 99
    x, y, width, height = figure.strongest_rain(rainy, clean)
    assert (width, height) == (20, 20) and x <= 65 and x + width >= 80 and y <= 35 and y + height >= 50


def test_results_of_another_size_are_named_in_the_figure(toy):
    pytest.importorskip("matplotlib", reason="the figure needs the extra matplotlib")
    write_png(toy / "results" / "Mine" / "Rain200L" / "0.png", np.zeros((16, 16, 3), np.uint8))
    assert "not of one size" in run(toy, "--datasets", "Rain200L", "--figure", "Rain200L/0")[2]
