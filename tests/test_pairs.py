from pathlib import Path

import numpy as np
import pytest

from ablations import NETWORKS
from utils.files import UserError
from utils.pairs import DATASETS, Pair, find_pairs, hold_out, how_to_get, known_dataset, pair_folder
from utils.pictures import Picture, write_picture, write_png

GREY = np.full((20, 20, 3), 100, np.uint8)


def write_all(root, names):
    for name in names:
        write_picture(root / name, Picture(GREY))


def names_of(pairs, root):
    return [(str(p.input.relative_to(root / "input")), str(p.target.relative_to(root / "target"))) for p in pairs]


def test_pairs_are_found_by_name_not_by_position(tmp_path):
    inputs = ["7_DR.png", "901_1.png", "901_14.png", "_1.png", "a.png", "norain-1x2.png", "rain-007.png", "sub/a.png"]
    write_all(tmp_path / "input", inputs)
    targets = ["norain-007.png", "_1.png", "norain-1.jpg", "901.png", "a.png", "sub/a.png", "7_GT.png"]
    write_all(tmp_path / "target", targets)
    assert names_of(find_pairs(tmp_path), tmp_path) == [
        ("7_DR.png", "7_GT.png"),
        ("901_1.png", "901.png"),
        ("901_14.png", "901.png"),
        ("_1.png", "_1.png"),
        ("a.png", "a.png"),
        ("norain-1x2.png", "norain-1.jpg"),
        ("rain-007.png", "norain-007.png"),
        ("sub/a.png", "sub/a.png"),
    ]


def test_a_clean_picture_with_a_rainy_one_of_its_name_is_nobody_elses(tmp_path):
    write_all(tmp_path / "input", ["a.png", "a_1.png", "a_2.png"])
    write_all(tmp_path / "target", ["a.png", "a_1.png"])
    with pytest.raises(UserError, match=r"1 picture in .* cannot be paired.*\n.*a_2.png has no clean picture"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("folder, other", [("input", "target"), ("target", "input")])
def test_two_pictures_of_one_name_are_refused(tmp_path, folder, other):
    write_all(tmp_path / folder, ["a.png", "a.bmp"])
    write_all(tmp_path / other, ["a.png"])
    with pytest.raises(UserError, match="have the same name"):
        find_pairs(tmp_path)


def test_pictures_without_partner_are_all_listed(tmp_path):
    write_all(tmp_path / "input", ["a.png", "b.png", "d.png", "_2.png"])
    write_all(tmp_path / "target", ["a.png", "c.png", "d.png", "d.bmp.png"])
    with pytest.raises(UserError) as caught:
        find_pairs(tmp_path)
    message = str(caught.value)
    assert "4 pictures" in message
    for name in ("input/b.png has no clean", "input/_2.png has no clean", "target/c.png has no rainy", "target/d.bmp."):
        assert name in message


@pytest.mark.parametrize("name", DATASETS)
def test_recipes_are_complete(name):
    assert DATASETS[name].model in NETWORKS
    sentence = how_to_get(name)
    if name == "demo":
        assert "git checkout" in sentence
    else:
        assert f"Datasets/{name}/test/input" in sentence
        assert (DATASETS[name].url or "Datasets/README.md says") in sentence
    for folder in (f"Datasets/{name}", f"a/{name.lower()}/test/input/", f"results/NeRD-Rain/{name}", f"{name}/train"):
        assert known_dataset(folder) == name
    assert known_dataset(f"{name}/mine") is None and known_dataset("/") is None


@pytest.mark.parametrize("missing, other", [("input", "target"), ("target", "input")])
def test_missing_and_empty_folders_are_named(tmp_path, missing, other):
    write_all(tmp_path / other, ["a.png"])
    for clean_half in (None, "left"):
        with pytest.raises(UserError, match=f"{missing} does not exist: put rainy .* or use --clean_half left or"):
            find_pairs(tmp_path, clean_half)
    (tmp_path / missing).mkdir()
    with pytest.raises(UserError, match=f"{missing} holds no pictures"):
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


def test_a_folder_says_by_itself_whether_it_holds_pairs_of_files(pairs_folder):
    assert find_pairs(pairs_folder, "left") == find_pairs(pairs_folder) != []


def test_unequal_sizes_are_named(tmp_path):
    write_png(tmp_path / "a.png", GREY)
    write_png(tmp_path / "b.png", GREY[1:])
    with pytest.raises(UserError, match=r"a.png \(20×20\) and .*b.png \(20×19\) differ in size"):
        Pair(tmp_path / "a.png", tmp_path / "b.png").read()


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
