import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import make_pairs
from utils import doctor
from utils.pictures import Picture, read_image, write_picture, write_png

ROOT = Path(__file__).parent.parent


@pytest.fixture
def dataset(tmp_path):
    make_pairs(tmp_path / "mine" / "train", count=5, seed=1)
    make_pairs(tmp_path / "mine" / "test", count=3, seed=2)
    return tmp_path / "mine"


def report(capsys, *arguments, healthy):
    """Runs the doctor -> what it printed."""
    if healthy:
        doctor.main([str(argument) for argument in arguments])
    else:
        with pytest.raises(SystemExit) as caught:
            doctor.main([str(argument) for argument in arguments])
        assert caught.value.code == 1
    return capsys.readouterr().out


def test_the_command_runs_as_written():
    command = [sys.executable, "-m", "utils.doctor", "Datasets/demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Datasets/demo/train: 18 pairs of 18 published, 6 clean pictures; 360×360 (12), 360×240 (6)" in done.stdout
    assert "no problems found" in done.stdout


def test_a_healthy_set(dataset, capsys):
    text = report(capsys, dataset, healthy=True)
    assert "train: 5 pairs, 5 clean pictures; 48×40 (5)" in text and "no problems found" in text
    assert "3 pairs" in report(capsys, dataset / "test", healthy=True)


def test_unpaired_unreadable_and_unequal_pictures(dataset, capsys):
    (dataset / "train" / "target" / "0.png").unlink()
    (dataset / "train" / "input" / "1.png").write_bytes(b"broken")
    write_png(dataset / "train" / "target" / "2.png", np.zeros((20, 20, 3), np.uint8))
    write_png(dataset / "train" / "input" / "3.png", read_image(dataset / "train" / "target" / "3.png"))
    text = report(capsys, dataset, healthy=False)
    assert "cannot be used (4)" in text
    for reason in ("0.png has no clean", "1.png cannot be read", "differ in size", "3.png is the same picture as its"):
        assert reason in text


def test_a_test_set_without_one_pair(dataset, capsys):
    for path in (dataset / "test" / "target").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    text = report(capsys, dataset, healthy=False)
    assert "0.png has no clean picture" in text and "train: 5 pairs" in text


def test_folders_that_are_no_data_set(tmp_path, capsys):
    assert "input does not exist" in report(capsys, tmp_path, healthy=False)
    text = report(capsys, tmp_path / "Rain200L", healthy=False)
    assert "can be downloaded from" in text


def test_the_published_number_is_missed(tmp_path, capsys):
    make_pairs(tmp_path / "Rain12", count=11)
    text = report(capsys, tmp_path / "Rain12", healthy=False)
    assert "11 pairs of 12 published" in text and "Rain12 has 11 pairs instead of 12" in text
    make_pairs(tmp_path / "Rain12", count=12)
    assert "no problems found" in report(capsys, tmp_path / "Rain12", healthy=True)


def test_duplicates_are_noted(dataset, capsys):
    for folder in (dataset / "train" / "target", dataset / "test" / "input"):
        write_png(folder / "2.png", read_image(folder / "0.png"))
    text = report(capsys, dataset, healthy=True)
    assert "pictures with the same pixels (2)" in text
    assert f"{folder / '0.png'} = {folder / '2.png'}" in text


@pytest.mark.parametrize("change", ["none", "jpeg", "larger", "shifted"])
def test_clean_pictures_in_both_train_and_test_are_found(dataset, capsys, change):
    scene = cv2.resize(np.random.default_rng(5).integers(0, 255, (6, 8, 3), dtype=np.uint8), (96, 80))
    changed = {"larger": cv2.resize(scene, None, fx=2, fy=2), "shifted": np.roll(scene, 1, axis=1)}.get(change, scene)
    ending = "jpg" if change == "jpeg" else "png"
    for image, part, name in ((scene, "train", "s.png"), (changed, "test", f"s.{ending}")):
        write_picture(dataset / part / "target" / name, Picture(image), quality=85)
        write_picture(dataset / part / "input" / name, Picture(image // 2))
    text = report(capsys, dataset, healthy=change == "shifted")  # which is only alike
    if change != "shifted":
        assert "clean pictures in both train and test (1)" in text
        assert f"{dataset / 'test/target/s'}.{ending} looks like {dataset / 'train/target/s.png'}" in text


def test_halves_side_by_side(tmp_path, capsys):
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 255, (20, 41 if number == 2 else 48, 3), dtype=np.uint8)
        write_png(tmp_path / f"{number}.png", image)
    text = report(capsys, tmp_path, "--clean_half", "left", healthy=False)
    assert "24×20 (2)" in text and "41 pixels wide" in text
