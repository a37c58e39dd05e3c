import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from dataset_RGB import (
    DATASETS,
    MOVES,
    EpochSampler,
    Pair,
    TrainingPatches,
    ValidationPatches,
    find_pairs,
    hold_out,
    how_to_get,
    match_by_name,
    quiet_worker,
)
from tests.conftest import make_pairs
from utils.errors import UserError, sentence
from utils.images import read_image, to_tensor, write_png

GREY = np.full((20, 20, 3), 100, np.uint8)


def write_all(root, names):
    for name in names:
        write_png(root / name, GREY)


def names_of(pairs, root):
    return [(str(p.input.relative_to(root / "input")), str(p.target.relative_to(root / "target"))) for p in pairs]


def test_pairs_are_found_by_name_not_by_position(tmp_path):
    write_all(tmp_path / "input", ["a.png", "b.png", "sub/a.png", "norain-1x2.png", "rain-007.png"])
    write_all(tmp_path / "target", ["norain-007.png", "norain-1.png", "b.png", "a.png", "sub/a.png"])
    assert names_of(find_pairs(tmp_path), tmp_path) == [
        ("a.png", "a.png"),
        ("b.png", "b.png"),
        ("norain-1x2.png", "norain-1.png"),
        ("rain-007.png", "norain-007.png"),
        ("sub/a.png", "sub/a.png"),
    ]


def test_several_rainy_pictures_of_one_scene(tmp_path):
    rainy = [f"901_{number}.jpg" for number in range(1, 15)]
    paths = [tmp_path / "input" / name for name in rainy]
    clean = [tmp_path / "target" / "901.jpg"]
    pairs, problems = match_by_name(paths, clean, tmp_path / "input", tmp_path / "target")
    assert not problems and len(pairs) == 14 and {pair.target.name for pair in pairs} == {"901.jpg"}


def test_an_equal_name_beats_a_scene_name(tmp_path):
    write_all(tmp_path / "input", ["000_1.png", "000_2.png"])
    write_all(tmp_path / "target", ["000_1.png", "000_2.png"])
    assert names_of(find_pairs(tmp_path), tmp_path) == [("000_1.png", "000_1.png"), ("000_2.png", "000_2.png")]


def test_a_clean_picture_with_a_rainy_one_of_its_name_is_nobody_elses(tmp_path):
    write_all(tmp_path / "input", ["a.png", "a_1.png", "a_2.png"])
    write_all(tmp_path / "target", ["a.png", "a_1.png"])
    with pytest.raises(UserError, match=r"1 picture cannot be paired.*\n.*a_2.png has no clean picture"):
        find_pairs(tmp_path)


def test_two_rainy_pictures_of_one_name_are_refused(tmp_path):
    write_all(tmp_path / "input", ["a.png", "a.bmp"])
    write_all(tmp_path / "target", ["a.png"])
    with pytest.raises(UserError, match="have one name"):
        find_pairs(tmp_path)


def test_pictures_without_partner_are_all_listed(tmp_path):
    write_all(tmp_path / "input", ["a.png", "b.png", "d.png"])
    write_all(tmp_path / "target", ["a.png", "c.png", "d.png", "d.bmp.png"])
    with pytest.raises(UserError) as caught:
        find_pairs(tmp_path)
    message = str(caught.value)
    assert "3 pictures cannot be paired" in message
    for name in ("input/b.png has no clean", "target/c.png has no rainy", "target/d.bmp.png has no rainy"):
        assert name in message


def test_two_clean_pictures_of_one_name_are_refused(tmp_path):
    write_all(tmp_path / "input", ["a.png"])
    write_all(tmp_path / "target", ["a.png", "a.bmp"])
    with pytest.raises(UserError, match="have one name"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "demo"])
def test_how_to_get_a_data_set_says_where_it_belongs(name):
    sentence = how_to_get(name)
    assert f"Datasets/{name}/test/input" in sentence and "git" not in sentence
    assert (DATASETS[name].url or "Datasets/README.md says") in sentence


@pytest.mark.parametrize("missing", ["input", "target"])
def test_missing_and_empty_folders_are_named(tmp_path, missing):
    other = {"input": "target", "target": "input"}[missing]
    write_all(tmp_path / other, ["a.png"])
    with pytest.raises(UserError, match=f"{missing} does not exist"):
        find_pairs(tmp_path)
    (tmp_path / missing).mkdir()
    with pytest.raises(UserError, match=f"{missing} holds no pictures"):
        find_pairs(tmp_path)


def test_side_by_side_pictures_are_split(tmp_path):
    left, right = GREY + 50, GREY
    write_png(tmp_path / "1.png", np.hstack([left, right]))
    rainy, clean = find_pairs(tmp_path, clean_half="right")[0].read()
    assert np.array_equal(rainy, left) and np.array_equal(clean, right)
    rainy, clean = find_pairs(tmp_path, clean_half="left")[0].read()
    assert np.array_equal(rainy, right) and np.array_equal(clean, left)
    with pytest.raises(UserError, match="--clean_half"):
        find_pairs(tmp_path)
    write_png(tmp_path / "1.png", np.hstack([left, right])[:, 1:])
    with pytest.raises(UserError, match=r"1.png is 39 pixels wide"):
        find_pairs(tmp_path, clean_half="left")[0].read()


def test_unequal_sizes_are_named(tmp_path):
    write_png(tmp_path / "a.png", GREY)
    write_png(tmp_path / "b.png", GREY[1:])
    with pytest.raises(UserError, match=r"a.png \(20×20\) and .*b.png \(20×19\) are not of one size"):
        Pair(tmp_path / "a.png", tmp_path / "b.png").read()


def test_held_out_scenes_are_not_trained_on():
    pairs = [Pair(Path(f"{scene}_{version}"), Path(f"{scene}")) for scene in range(10) for version in range(3)]
    training, validation = hold_out(pairs, 0.2, seed=1)
    assert len(training) == 24 and len(validation) == 6
    assert not {pair.target for pair in training} & {pair.target for pair in validation}
    assert hold_out(pairs, 0.2, seed=1) == (training, validation)
    assert hold_out(pairs, 0.2, seed=2)[1] != validation


def grid_picture(size=64):
    """A picture whose every pixel tells where it is."""
    y, x = np.mgrid[:size, :size].astype(np.uint8)
    return np.stack([y, x, np.full_like(x, 9)], axis=2)


@pytest.fixture
def grid_pairs(tmp_path):
    """Pairs whose rainy picture is the clean one, 100 grey levels brighter in its third channel."""
    for folder, shift in (("input", 100), ("target", 0)):
        for number in range(4):
            write_png(tmp_path / folder / f"{number}.png", grid_picture() + np.array([0, 0, shift], np.uint8))
    return find_pairs(tmp_path)


def test_rainy_and_clean_patches_show_the_same_place(grid_pairs):
    patches = TrainingPatches(grid_pairs, 32, seed=3)
    plain = 0
    for index in range(60):
        item = patches[index]
        assert item["input"].shape == item["target"].shape == (3, 32, 32)
        shown = (item["target"] * 255).round()
        if shown[2].unique().tolist() == [9]:  # without a change of saturation the coordinates can be read
            plain += 1
            assert torch.equal(shown[:2], (item["input"] * 255).round()[:2])
            steps = {abs(int(v)) for d in (0, 1) for v in shown[:2].diff(dim=d + 1).unique()}
            assert steps <= {0, 1}
    assert 25 <= plain <= 55  # two thirds


def test_samples_repeat_and_differ_between_epochs(grid_pairs):
    one, other = TrainingPatches(grid_pairs, 32, seed=3), TrainingPatches(grid_pairs, 32, seed=4)
    assert torch.equal(one[5]["input"], one[5]["input"])
    assert not torch.equal(one[1]["input"], one[5]["input"])  # picture 1 in epochs 0 and 1
    assert one[1]["name"] == one[5]["name"]
    assert not torch.equal(one[5]["input"], other[5]["input"])


def test_the_nine_moves():
    image = grid_picture(8)
    images = [np.ascontiguousarray(move(image)).tobytes() for move in MOVES]
    counts = Counter(images)
    assert len(MOVES) == 9 and counts[image.tobytes()] == 2 and len(counts) == 8
    assert np.array_equal(MOVES[1](image), image[::-1]) and np.array_equal(MOVES[2](image), image[:, ::-1])
    assert np.array_equal(MOVES[3](image)[-1, 0], image[0, 0])  # counter-clockwise
    assert np.array_equal(MOVES[6](image), MOVES[3](MOVES[1](image)))
    assert np.array_equal(MOVES[7](image), MOVES[3](MOVES[2](image)))


def test_moves_and_saturation_are_drawn_as_published(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8, :8] = (200, 100, 50)  # after a move the coloured quarter tells which
    for folder in ("input", "target"):
        write_png(tmp_path / folder / "a.png", picture)
    patches = TrainingPatches(find_pairs(tmp_path), 16, seed=0)
    corners, saturated = Counter(), 0
    for index in range(900):
        patch = patches[index]["input"]
        corner = next(c for c in ((0, 0), (0, 15), (15, 0), (15, 15)) if patch[:, c[0], c[1]].sum() > 0)
        corners[corner] += 1
        colour = patch[:, corner[0], corner[1]] * 255
        saturated += not torch.allclose(colour, torch.tensor([200.0, 100.0, 50.0]))
        grey = colour @ torch.tensor([0.2989, 0.587, 0.114])
        factor = (colour[0] - grey) / (200 - grey)
        assert 0.79 <= factor <= 1.21
    assert 240 <= saturated <= 360  # a third
    # The corner stays by 2 idle moves and by horizontal flip + 90°; 2 of the 9 moves take it to each other corner.
    for corner, moves in (((0, 0), 3), ((15, 0), 2), ((0, 15), 2), ((15, 15), 2)):
        assert abs(corners[corner] - 100 * moves) < 60, corners


def test_small_pictures_are_padded_to_the_patch(tmp_path):
    make_pairs(tmp_path, count=1, size=(1, 7))
    for dataset in (TrainingPatches(find_pairs(tmp_path), 32, seed=0), ValidationPatches(find_pairs(tmp_path), 32)):
        assert dataset[0]["input"].shape == (3, 32, 32)


def test_validation_shows_the_centre(grid_pairs):
    item = ValidationPatches(grid_pairs, 32)[2]
    assert torch.equal(item["target"], to_tensor(read_image(grid_pairs[2].target)[16:48, 16:48]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_samples_do_not_depend_on_workers_or_on_an_interruption(grid_pairs, workers):
    patches = TrainingPatches(grid_pairs, 32, seed=3)
    sampler = EpochSampler(len(patches), 1, seed=3)
    expected = {}
    for epoch in range(2):
        sampler.epoch = epoch
        expected[epoch] = [patches[index] for (index,) in sampler]
    assert [item["name"] for item in expected[0]] != [item["name"] for item in expected[1]]
    loader = DataLoader(patches, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    list(loader)
    sampler.skip = 1  # as if one batch of the epoch had been used before the interruption
    items = list(loader)
    assert len(items) == 3
    for item, original in zip(items, expected[1][1:]):
        assert item["name"] == [original["name"]] and torch.equal(item["input"][0], original["input"])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size, batch_size", [(12, 4), (10, 4), (9, 4), (3, 4)])
def test_processes_share_each_batch_of_a_single_process(size, batch_size, world):
    order = DistributedSampler(range(size), num_replicas=1, rank=0, seed=5)  # the order that runs have always had
    order.set_epoch(3)
    batches = torch.tensor(list(order)).add(3 * size).split(batch_size)
    samplers = [EpochSampler(size, batch_size, 5, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.epoch = 3
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {len(batches)}
    for number, batch in enumerate(batches):
        counted = []
        for sampler, share in zip(samplers, shares):
            own, together = sampler.share(number)
            assert together == len(batch) and len(share[number]) == max(own, 1)
            counted += share[number][:own]
        assert sorted(counted) == sorted(batch.tolist())
    samplers[-1].skip = 1
    assert list(samplers[-1]) == shares[-1][1:]


def test_a_broken_picture_in_a_worker_is_named(pairs_folder):
    (pairs_folder / "input" / "3.png").write_bytes(b"broken")
    patches = TrainingPatches(find_pairs(pairs_folder), 32, seed=0)
    with pytest.raises(UserError) as caught:
        list(DataLoader(patches, num_workers=1, worker_init_fn=quiet_worker))
    message = sentence(caught.value)
    assert message.startswith(str(pairs_folder / "input" / "3.png") + " cannot be read") and "\n" not in message


def test_a_process_ends_though_its_workers_leave_sigterm_to_it(pairs_folder):
    """Also where a failed iteration, kept by its traceback, still has a worker at the end."""
    (pairs_folder / "input" / "3.png").write_bytes(b"broken")
    script = f"""
from torch.utils.data import DataLoader
from dataset_RGB import TrainingPatches, find_pairs, quiet_worker
patches = TrainingPatches(find_pairs({str(pairs_folder)!r}), 32, seed=0)
try:
    list(DataLoader(patches, num_workers=1, worker_init_fn=quiet_worker))
except Exception as error:
    kept = error
"""
    run = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
