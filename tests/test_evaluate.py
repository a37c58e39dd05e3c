import csv
import json
import shutil

import numpy as np
import pytest

from evaluations import evaluate
from evaluations.metrics import psnr_ssim
from tests.conftest import failure, make_pairs
from utils.pairs import Pair
from utils.pictures import read_image, write_png


@pytest.fixture
def folders(tmp_path):
    """Folders of results and of clean pictures."""
    root = make_pairs(tmp_path, count=12)
    (root / "input").rename(root / "results")
    return root / "results", root / "target"


def run(results, targets, *options):
    evaluate.main(["--results", str(results), "--targets", str(targets), *options])


@pytest.mark.parametrize("protocol", ["rain200", "did"])
def test_pictures_means_and_the_worst_ten_are_written(folders, protocol, capsys):
    results, targets = folders
    run(results, targets, "--protocol", protocol)
    with open(results / f"evaluation_{protocol}.csv", newline="") as file:
        rows = {row["picture"]: (float(row["psnr"]), float(row["ssim"])) for row in csv.DictReader(file)}
    images = {path.name: (read_image(path), read_image(targets / path.name)) for path in results.glob("*.png")}
    assert rows == {name: psnr_ssim(*pair, protocol) for name, pair in images.items()}
    summary = json.loads((results / f"evaluation_{protocol}.json").read_text())
    values = np.array(list(rows.values()))
    assert (summary["mean"]["psnr"], summary["mean"]["ssim"]) == pytest.approx(tuple(values.mean(axis=0)))
    assert summary["standard_deviation"]["psnr"] == pytest.approx(values[:, 0].std())
    assert (summary["pictures"], summary["protocol"]) == (12, protocol) and summary["software"]["numpy"]
    worst = sorted(rows, key=rows.get)[:10]
    assert [row["picture"] for row in summary["worst"]] == worst
    printed = capsys.readouterr().out
    assert f"{values[:, 0].mean():.6f}" in printed and "12 pictures (unknown data set: name it with" in printed
    assert [line.split()[0] for line in printed.splitlines()[3:13]] == worst


def test_missing_extra_broken_unequal_and_doubled_pictures_are_listed(folders, capsys):
    results, targets = folders
    (targets / "0.png").unlink()
    (results / "1.png").unlink()
    (results / "2.png").write_bytes(b"broken")
    write_png(results / "3.png", np.zeros((20, 20, 3), np.uint8))
    shutil.copy(results / "4.png", results / "4.bmp")
    message = failure(run, results, targets, "--protocol", "rain200")
    assert "the results are not complete" in message and "--go_on averages over 7 pictures" in message
    assert f"{results / '0.png'} has no clean picture" in message
    assert f"{targets / '1.png'} has 0 derained pictures" in message
    assert all(str(results / f"{number}.png") in message for number in (2, 3)) and "have the same name" in message
    assert not list(results.glob("evaluation*"))
    run(results, targets, "--protocol", "rain200", "--go_on")
    assert "left out:" in capsys.readouterr().out
    summary = json.loads((results / "evaluation_rain200.json").read_text())
    assert summary["pictures"] == 7 and len(summary["left_out"]) == 6  # 4.png has no derained picture, either


def test_data_sets_set_the_protocol_and_the_number_of_pictures(folders, tmp_path, capsys):
    results, targets = folders
    for layout in ("", "target", "test/target"):
        shutil.copytree(targets, tmp_path / "Rain12" / layout, dirs_exist_ok=True)
        run(results, tmp_path / "Rain12")
        assert "12 of the 12 pictures of Rain12, protocol rain200" in capsys.readouterr().out
    message = failure(run, results, targets, "--dataset", "DDN-Data")
    assert "12 of the 1400 pictures of DDN-Data can be measured" in message and "--go_on" in message
    run(results, targets, "--dataset", "DDN-Data", "--go_on")
    assert "protocol did" in capsys.readouterr().out
    shutil.copy(targets / "0.png", results / "0.png")
    run(results, targets, "--protocol", "did")
    mean = json.loads((results / "evaluation_did.json").read_text())["mean"]
    assert mean["psnr"] is None and 0 < mean["ssim"] < 1  # JSON has no infinity
    assert failure(run, results, targets) == "2"
    assert "give --protocol rain200" in capsys.readouterr().err


def test_one_folder_with_both_as_the_matlab_scripts_expect(tmp_path):
    for name in ("0_DR.png", "0_GT.png", "3_DR.png"):
        (tmp_path / name).touch()
    pairs, (problem,) = evaluate.pair_results(tmp_path, tmp_path)
    assert pairs == [Pair(tmp_path / "0_DR.png", tmp_path / "0_GT.png")] and "3_DR.png has no clean picture" in problem
    (tmp_path / "0_GT.png").unlink()
    assert "N_DR and N_GT" in failure(run, tmp_path, tmp_path, "--protocol", "did")


def test_a_missing_one_of_several_results_of_a_scene_is_noticed(tmp_path, monkeypatch):
    for name in ("901_1", "901_2", "901_3", "902_1"):
        for path in (f"target/{name[:3]}.png", f"input/{name}.png", f"results/{name}.png"):
            write_png(tmp_path / path, np.zeros((1, 1, 3), np.uint8))
    pairs, problems = evaluate.pair_results(tmp_path / "results", tmp_path)
    assert len(pairs) == 4 and not problems
    monkeypatch.chdir(tmp_path / "target")  # a folder without a name
    assert len(evaluate.pair_results(tmp_path / "results", ".")[0]) == 4
    (tmp_path / "results" / "901_3.png").unlink()
    (problem,) = evaluate.pair_results(tmp_path / "results", tmp_path)[1]
    assert "901.png has 2 derained pictures" in problem and "where 3 should be" in problem
