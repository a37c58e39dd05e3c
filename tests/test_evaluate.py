import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations import evaluate
from evaluations.metrics import psnr_ssim
from tests.conftest import make_pairs
from utils.pairs import Pair
from utils.pictures import read_image, write_png

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folders(tmp_path):
    """Folders of results and of clean pictures."""
    root = make_pairs(tmp_path, count=12)
    (root / "input").rename(root / "results")
    return root / "results", root / "target"


def run(results, targets, *options):
    evaluate.main(["--results", str(results), "--targets", str(targets), *options])


def failure(*args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    return str(caught.value.code)


@pytest.mark.parametrize("protocol", ["rain200", "did"])
def test_pictures_means_and_the_worst_ten_are_written(folders, protocol, capsys):
    results, targets = folders
    run(results, targets, "--protocol", protocol)
    with open(results / f"evaluation_{protocol}.csv", newline="") as file:
        rows = {row.pop("picture"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    expected = {
        path.name: psnr_ssim(read_image(path), read_image(targets / path.name), protocol)
        for path in results.glob("*.png")
    }
    assert {name: (row["psnr"], row["ssim"]) for name, row in rows.items()} == expected
    summary = json.loads((results / f"evaluation_{protocol}.json").read_text())
    values = np.array(list(expected.values()))
    assert (summary["mean"]["psnr"], summary["mean"]["ssim"]) == pytest.approx(tuple(values.mean(axis=0)))
    assert summary["standard_deviation"]["psnr"] == pytest.approx(values[:, 0].std())
    assert (summary["pictures"], summary["protocol"]) == (12, protocol) and summary["software"]["numpy"]
    worst = sorted(expected, key=expected.get)[:10]
    assert [row["picture"] for row in summary["worst"]] == worst
    printed = capsys.readouterr().out
    assert f"{values[:, 0].mean():.6f}" in printed and "12 pictures (of no known data set, --dataset names" in printed
    assert [line.split()[0] for line in printed.splitlines()[3:13]] == worst


def test_the_command_runs_as_written_and_means_may_be_infinite(folders):
    shutil.copy(folders[1] / "0.png", folders[0] / "0.png")
    command = [sys.executable, "-m", "evaluations.evaluate", "--results", folders[0], "--targets", folders[1]]
    done = subprocess.run([*command, "--protocol", "did"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "protocol did" in done.stdout
    mean = json.loads((folders[0] / "evaluation_did.json").read_text())["mean"]
    assert mean["psnr"] is None and 0 < mean["ssim"] < 1


def test_missing_extra_broken_unequal_and_doubled_pictures_are_listed(folders, capsys):
    results, targets = folders
    (targets / "0.png").unlink()
    (results / "1.png").unlink()
    (results / "2.png").write_bytes(b"broken")
    write_png(results / "3.png", np.zeros((20, 20, 3), np.uint8))
    Image.fromarray(read_image(results / "4.png")).save(results / "4.jpg")
    message = failure(results, targets, "--protocol", "rain200")
    assert "the results are not complete" in message and "--go_on averages over 7 pictures" in message
    assert f"{results / '0.png'} has no clean picture" in message
    assert f"{targets / '1.png'} has 0 derained pictures" in message
    assert all(str(results / f"{number}.png") in message for number in (2, 3)) and "have the same name" in message
    assert not list(results.glob("evaluation*"))
    run(results, targets, "--protocol", "rain200", "--go_on")
    assert "left out:" in capsys.readouterr().out
    summary = json.loads((results / "evaluation_rain200.json").read_text())
    assert summary["pictures"] == 7 and len(summary["left_out"]) == 6  # 4.png has no derained picture, either


@pytest.mark.parametrize("layout", ["", "target", "test/target"])
def test_data_sets_set_the_protocol_and_the_number_of_pictures(folders, tmp_path, layout, capsys):
    shutil.copytree(folders[0], tmp_path / "results" / "Rain12")
    shutil.copytree(folders[1], tmp_path / "Rain12" / layout, dirs_exist_ok=True)
    run(tmp_path / "results" / "Rain12", tmp_path / "Rain12")
    assert "12 of the 12 pictures of Rain12, protocol rain200" in capsys.readouterr().out
    message = failure(*folders, "--dataset", "DDN-Data")
    assert "12 of the 1400 pictures of DDN-Data can be measured" in message and "--go_on" in message
    run(*folders, "--dataset", "DDN-Data", "--go_on")
    assert "protocol did" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*folders)
    assert "give --protocol rain200" in capsys.readouterr().err


def test_one_folder_with_both_as_the_matlab_scripts_expect(folders, tmp_path):
    both = tmp_path / "both"
    for source, ending in zip(folders, ("DR", "GT")):
        for path in source.iterdir():
            write_png(both / f"{path.stem}_{ending}.png", read_image(path))
    pairs, problems = evaluate.pair_results(both, both)
    assert pairs[0] == Pair(both / "0_DR.png", both / "0_GT.png") and len(pairs) == 12 and not problems
    (both / "3_GT.png").unlink()
    assert "3_DR.png has no clean picture" in evaluate.pair_results(both, both)[1][0]
    assert "N_DR and N_GT" in failure(folders[0], folders[0], "--protocol", "did")


def test_a_missing_one_of_several_results_of_a_scene_is_noticed(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "results").mkdir()
    for name in ("901_1", "901_2", "901_3", "902_1"):
        write_png(tmp_path / "target" / f"{name[:3]}.png", image)
        write_png(tmp_path / "input" / f"{name}.png", image)
        # JPEG data called .png, as some published results are
        Image.fromarray(image).save(tmp_path / "results" / f"{name}.png", format="JPEG")
    rows, problems = evaluate.measure(tmp_path / "results", tmp_path, "did")
    assert len(rows) == 4 and not problems and all(10 < values[0] < 60 for _, values in rows)
    (tmp_path / "results" / "901_3.png").unlink()
    (problem,) = evaluate.pair_results(tmp_path / "results", tmp_path)[1]
    assert "901.png has 2 derained pictures" in problem and "where 3 should be" in problem
