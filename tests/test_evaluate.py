import csv
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_RGB import Pair, known_dataset
from evaluations import evaluate
from evaluations.metrics import psnr_ssim
from tests.conftest import make_pairs
from utils.images import read_image, write_png

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folders(tmp_path):
    """Folders of results and of clean pictures."""
    root = make_pairs(tmp_path, count=12)
    return root / "input", root / "target"


def run(results, targets, *options, protocol="rain200"):
    evaluate.main(["--results", str(results), "--targets", str(targets), "--protocol", protocol, *options])


def failure(*args, **options):
    with pytest.raises(SystemExit) as caught:
        run(*args, **options)
    return str(caught.value.code)


@pytest.mark.parametrize("protocol", ["rain200", "did"])
def test_pictures_means_and_the_worst_ten_are_written(folders, protocol, capsys):
    results, targets = folders
    run(results, targets, protocol=protocol)
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
    assert summary["pictures"] == 12 and summary["protocol"] == protocol and summary["software"]["numpy"]
    assert [row["picture"] for row in summary["worst"]] == sorted(expected, key=expected.get)[:10]
    printed = capsys.readouterr().out
    assert f"{values[:, 0].mean():.4f}" in printed
    worst = [line.split()[0] for line in printed.partition("the worst 10:\n")[2].splitlines()[:10]]
    assert worst == sorted(expected, key=expected.get)[:10]


def test_the_command_runs_as_written(folders):
    results, targets = folders
    command = [sys.executable, "evaluations/evaluate.py", "--results", results, "--targets", targets]
    done = subprocess.run([*command, "--protocol", "did"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 pictures" in done.stdout and "protocol did" in done.stdout


def test_the_order_of_files_does_not_matter(folders):
    pairs, _ = evaluate.pair_results(*folders)
    rows, _ = evaluate.measure_pairs(pairs, "rain200")
    mixed = random.Random(0).sample(pairs, len(pairs))
    assert sorted(evaluate.measure_pairs(mixed, "rain200")[0]) == sorted(rows)


def test_missing_extra_broken_and_unequal_pictures_are_listed(folders, capsys):
    results, targets = folders
    (targets / "0.png").unlink()
    (results / "1.png").unlink()
    (results / "2.png").write_bytes(b"broken")
    write_png(results / "3.png", np.zeros((20, 20, 3), np.uint8))
    message = failure(results, targets)
    assert "the results are not complete" in message and "--go_on" in message
    assert f"{results / '0.png'} has no clean picture" in message
    assert f"{targets / '1.png'} has no derained picture" in message
    assert f"{results / '2.png'} cannot be read" in message and "are not of one size" in message
    assert not list(results.glob("evaluation*"))
    run(results, targets, "--go_on")
    assert "8 pictures" in capsys.readouterr().out
    assert len(json.loads((results / "evaluation_rain200.json").read_text())["left_out"]) == 4


def test_the_expected_number_of_pictures_is_printed(folders, tmp_path, capsys):
    shutil.copytree(folders[0], tmp_path / "results" / "Rain12")
    shutil.copytree(folders[1], tmp_path / "Rain12" / "test" / "target")
    evaluate.main(["--results", str(tmp_path / "results" / "Rain12"), "--targets", str(tmp_path / "Rain12")])
    assert "12 of the 12 pictures of Rain12, protocol rain200" in capsys.readouterr().out
    message = failure(*folders, "--dataset", "DDN-Data", protocol="did")
    assert "12 pictures were measured, DDN-Data has 1400" in message and "--go_on" in message
    run(*folders, "--dataset", "DDN-Data", "--go_on", protocol="did")
    assert "12 of the 1400 pictures of DDN-Data, protocol did" in capsys.readouterr().out


def test_a_protocol_is_needed_where_the_data_set_is_not_known(folders, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--results", str(folders[0]), "--targets", str(folders[1])])
    assert "--protocol rain200" in capsys.readouterr().err


def test_data_sets_are_known_by_their_folders(tmp_path):
    assert known_dataset("x/did-data/test/target") == "DID-Data" and known_dataset("nothing") is None
    assert known_dataset("Rain200L/results/Rain200H") == "Rain200H"
    assert known_dataset("demo/mine/target") is None
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "Rain12").symlink_to(tmp_path / "elsewhere")
    assert known_dataset(tmp_path / "Rain12") == "Rain12"


def test_one_folder_with_both_as_the_matlab_scripts_expect(folders, tmp_path):
    both = tmp_path / "both"
    for source, ending in zip(folders, ("DR", "GT")):
        for path in source.iterdir():
            write_png(both / f"{path.stem}_{ending}.png", read_image(path))
    pairs, problems = evaluate.pair_results(both, both)
    assert pairs[0] == Pair(both / "0_DR.png", both / "0_GT.png") and len(pairs) == 12 and not problems
    (both / "3_GT.png").unlink()
    assert "3_DR.png has no clean picture" in evaluate.pair_results(both, both)[1][0]
    assert "N_DR and N_GT" in failure(folders[0], folders[0])


@pytest.mark.parametrize("layout", ["", "target", "test/target"])
def test_clean_pictures_are_found_in_a_data_set(folders, tmp_path, layout):
    shutil.copytree(folders[1], tmp_path / "set" / layout, dirs_exist_ok=True)
    pairs, problems = evaluate.pair_results(folders[0], tmp_path / "set")
    assert len(pairs) == 12 and not problems


def test_several_results_of_one_scene_and_jpeg_data_called_png(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    write_png(tmp_path / "clean" / "901.png", image)
    (tmp_path / "results").mkdir()
    for version in range(1, 15):
        Image.fromarray(image).save(tmp_path / "results" / f"901_{version}.png", format="JPEG")
    pairs, problems = evaluate.pair_results(tmp_path / "results", tmp_path / "clean")
    rows, unmeasured = evaluate.measure_pairs(pairs, "did")
    assert len(rows) == 14 and not problems and not unmeasured
    assert all(10 < psnr < 60 for _, (psnr, _) in rows)


def test_a_missing_one_of_several_results_is_noticed(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    for scene in (901, 902):
        write_png(tmp_path / "target" / f"{scene}.png", image)
        for version in range(1, 15):
            for folder in ("input", "results"):
                write_png(tmp_path / folder / f"{scene}_{version}.png", image)
    assert evaluate.pair_results(tmp_path / "results", tmp_path)[1] == []
    (tmp_path / "results" / "901_3.png").unlink()
    problems = evaluate.pair_results(tmp_path / "results", tmp_path)[1]
    assert len(problems) == 1 and "901.png has 13 derained pictures" in problems[0] and "14 rainy" in problems[0]


def test_two_results_of_one_name_are_not_averaged(folders):
    Image.fromarray(read_image(folders[0] / "3.png")).save(folders[0] / "3.jpg")
    pairs, problems = evaluate.pair_results(*folders)
    assert len(pairs) == 11 and any("have one name" in problem for problem in problems)


def test_results_equal_to_their_targets_are_remarked_on(folders, capsys):
    shutil.copy(folders[1] / "0.png", folders[0] / "0.png")
    run(*folders)
    assert "identical to their clean pictures: 1." in capsys.readouterr().out
    summary = json.loads((folders[0] / "evaluation_rain200.json").read_text())
    assert summary["identical_pictures"] == 1 and summary["mean"]["psnr"] is None and summary["mean"]["ssim"] < 1
