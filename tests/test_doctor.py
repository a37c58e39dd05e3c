import contextlib

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, make_pairs, random_picture
from utils import doctor
from utils.pictures import Picture, read_image, write_picture, write_png


@pytest.fixture
def dataset(tmp_path):
    make_pairs(tmp_path / "mine" / "train", count=5, seed=1)
    make_pairs(tmp_path / "mine" / "test", count=3, seed=2)
    return tmp_path / "mine"


def report(capsys, *arguments, healthy):
    """Runs the doctor -> what it printed."""
    with contextlib.nullcontext() if healthy else pytest.raises(SystemExit, match=r"^1$"):
        doctor.main([str(argument) for argument in arguments])
    text = capsys.readouterr().out
    assert ("no problems found" in text) == healthy
    return text


def test_the_demo_is_healthy(capsys):
    text = report(capsys, ROOT / "Datasets" / "demo", healthy=True)
    assert "Datasets/demo/train: 18 pairs of 18 published, 6 clean pictures; 360×360 (12), 360×240 (6)" in text


def test_pictures_that_are_not_pairs(dataset, capsys):
    (dataset / "train" / "target" / "0.png").unlink()
    (dataset / "train" / "input" / "1.png").write_bytes(b"broken")
    write_png(dataset / "train" / "target" / "2.png", np.zeros((20, 20, 3), np.uint8))
    write_png(dataset / "train" / "input" / "3.png", read_image(dataset / "train" / "target" / "3.png"))
    for path in (dataset / "test" / "target").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    text = report(capsys, dataset, healthy=False)
    assert "cannot be used (10)" in text and "test: 0 pairs" in text
    assert "input/2.png (48×40) and" in text and "target/2.png (20×20) differ in size" in text
    for reason in ("0.png has no clean", "1.png cannot be read", "3.png is the same picture as its"):
        assert reason in text


def test_the_published_number_is_missed(tmp_path, capsys):
    assert "can be downloaded" in report(capsys, tmp_path / "Rain12", healthy=False)
    make_pairs(tmp_path / "Rain12", count=11)
    text = report(capsys, tmp_path / "Rain12", healthy=False)
    assert "11 pairs of 12 published" in text and "Rain12 has 11 pairs instead of 12" in text
    make_pairs(tmp_path / "Rain12", count=12)
    report(capsys, tmp_path / "Rain12", healthy=True)


def test_duplicates_are_noted(dataset, capsys):
    assert "same pixels" not in report(capsys, dataset / "test", healthy=True)
    for folder in (dataset / "train" / "target", dataset / "test" / "input"):
        write_png(folder / "2.png", read_image(folder / "0.png"))
    text = report(capsys, dataset, healthy=True)
    assert "train: 5 pairs, 5 clean pictures; 48×40 (5)" in text and "pictures with the same pixels (2)" in text
    assert f"{folder / '0.png'} = {folder / '2.png'}" in text


@pytest.mark.parametrize("change", ["none", "jpeg", "larger", "shifted"])
def test_clean_pictures_in_both_train_and_test_are_found(dataset, capsys, change):
    scene = cv2.resize(random_picture(6, 8, seed=5), (96, 80))
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
    write_png(tmp_path / "1.png", random_picture(20, 48))
    assert "24×20 (1)" in report(capsys, tmp_path, "--clean_half", "left", healthy=True)
