from pathlib import Path

import numpy as np
import pytest

from ablations import NETWORKS
from utils.files import UserError
from utils.pairs import DATASETS, Pair, find_pairs, hold_out, how_to_get, known_dataset, pair_folder
from utils.pictures import write_png

GREY = np.full((20, 20, 3), 100, np.uint8)


def write_all(root, names):
    for name in names:
        write_png(root / name, GREY)


def test_pairs_are_found_by_name_not_by_position(tmp_path):
    inputs = ["7_DR.png", "901_1.png", "901_14.png", "_1.png", "a.png", "norain-1x2.png", "rain-007.png", "sub/a.png"]
    targets = ["7_GT.png", "901.png", "901.png", "_1.png", "a.png", "norain-1.jpg", "norain-007.png", "sub/a.png"]
    write_all(tmp_path / "input", inputs)
    write_all(tmp_path / "target", targets)
    expected = [Pair(tmp_path / "input" / name, tmp_path / "target" / clean) for name, clean in zip(inputs, targets)]
    for clean_half in (None, "left"):  # whose folders say by themselves that they hold pairs of files
        assert find_pairs(tmp_path, clean_half) == expected


@pytest.mark.parametrize(
    "inputs, targets, sentences",
    [
        (["a.png", "a_1.png", "a_2.png"], ["a.png", "a_1.png"], ["input/a_2.png has no clean"]),  # a.png is another's
        (["a.png", "a.bmp"], ["a.png"], ["have the same name", "a.png has no rainy"]),
        (["a.png"], ["a.png", "a.bmp"], ["have the same name", "a.png has no rainy"]),
        (
            ["a.png", "b.png", "d.png", "_2.png"],
            ["a.png", "c.png", "d.png", "d.bmp.png"],
            ["b.png has no clean", "_2.png has no clean", "c.png has no rainy", "d.bmp.png has no rainy"],
        ),
    ],
)
def test_pictures_that_cannot_be_paired_are_all_listed(tmp_path, inputs, targets, sentences):
    write_all(tmp_path / "input", inputs)
    write_all(tmp_path / "target", targets)
    with pytest.raises(UserError) as caught:
        find_pairs(tmp_path)
    assert f"{len(sentences)} picture" in str(caught.value) and all(s in str(caught.value) for s in sentences)


@pytest.mark.parametrize("name", DATASETS)
def test_recipes_are_complete(name):
    assert DATASETS[name].model in NETWORKS
    place = DATASETS[name].url or "Datasets/README.md says"
    for text in ["git checkout"] if name == "demo" else [f"Datasets/{name}/test/input", place]:
        assert text in how_to_get(name)
    for folder in (f"Datasets/{name}", f"a/{name.lower()}/test/input/", f"results/NeRD-Rain/{name}", f"{name}/train"):
        assert known_dataset(folder) == name
    assert known_dataset(f"{name}/mine") is None and known_dataset("/") is None


def test_missing_and_empty_folders_are_named(tmp_path):
    write_all(tmp_path / "input", ["a.png"])
    for clean_half in (None, "left"):
        with pytest.raises(UserError, match=r"target does not exist: put rainy .* or use --clean_half left or"):
            find_pairs(tmp_path, clean_half)
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match="target holds no pictures"):
        find_pairs(tmp_path)
    with pytest.raises(UserError, match=r"Rain200L/test does not exist: Rain200L \(1800 .*can be downloaded from"):
        find_pairs(tmp_path / "Rain200L" / "test", "left")


@pytest.mark.parametrize("clean_half", ["left", "right"])
def test_side_by_side_pictures_are_split(tmp_path, clean_half):
    rainy, clean = GREY + 50, GREY
    write_png(tmp_path / "1.png", np.hstack([clean, rainy] if clean_half == "left" else [rainy, clean]))
    pairs, problems = pair_folder(tmp_path, clean_half)
    assert not problems and all(np.array_equal(*images) for images in zip(pairs[0].read(), (rainy, clean)))
    write_png(tmp_path / "1.png", GREY[:, 1:])
    with pytest.raises(UserError, match=r"1.png is 19 pixels wide"):
        find_pairs(tmp_path, clean_half)[0].read()


def test_held_out_scenes_are_not_trained_on():
    pairs = [Pair(Path(f"{scene}_{version}"), Path(f"{scene}")) for scene in range(10) for version in range(3)]
    training, validation = hold_out(pairs, 0.2, seed=1)
    assert len(training) == 24 and len(validation) == 6
    assert not {pair.target for pair in training} & {pair.target for pair in validation}
    assert hold_out(pairs, 0.2, seed=1) == (training, validation)
    assert hold_out(pairs, 0.2, seed=2)[1] != validation
    assert [len(part) for part in hold_out(pairs, 0.001, seed=1)] == [27, 3]
    assert [len(part) for part in hold_out(pairs, 1, seed=1)] == [3, 27]
    with pytest.raises(UserError, match="at least two clean pictures"):
        hold_out(pairs[:3], 0.2, seed=1)
