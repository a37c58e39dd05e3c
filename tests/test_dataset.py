import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.functional import adjust_saturation

from dataset_RGB import EpochSampler, Photo, TrainingPatches, ValidationPatches, to_uint8_tensor
from tests.conftest import ROOT
from utils.pairs import find_pairs
from utils.pictures import write_png


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
        rainy, clean = patches[index]["input"], patches[index]["target"]
        assert rainy.shape == clean.shape == (3, 32, 32) and rainy.dtype == clean.dtype == torch.uint8
        if clean[2].unique().tolist() == [9] and rainy[2].unique().tolist() == [109]:  # the saturation was left alone
            plain += 1
            assert torch.equal(clean[:2], rainy[:2])
            assert {abs(step) for d in (1, 2) for step in clean[:2].int().diff(dim=d).unique().tolist()} <= {0, 1}
    assert 25 <= plain <= 55  # two thirds


def test_samples_repeat_and_differ_between_epochs(grid_pairs):
    one, other = TrainingPatches(grid_pairs, 32, seed=3), TrainingPatches(grid_pairs, 32, seed=4)
    first, second = one[1], one[5]  # picture 1 in epochs 0 and 1
    assert first["name"] == second["name"] and not torch.equal(first["input"], second["input"])
    assert torch.equal(second["input"], one[5]["input"])
    assert not torch.equal(second["input"], other[5]["input"])


def test_moves_and_saturation_are_drawn_as_published(tmp_path):
    """Nine moves, each in one of nine samples, of which two do nothing, and another saturation in one of three."""
    picture, saturated, moved = np.zeros((16, 16, 3), np.uint8), 0, Counter()
    picture[:4, :8] = (200, 100, 50)  # after a move the coloured part tells which
    for folder in ("input", "target"):
        write_png(tmp_path / folder / "a.png", picture)
    patches = TrainingPatches(find_pairs(tmp_path), 16, seed=0)
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)
    weakest, strongest = (adjust_saturation(colour[:, None, None], factor).flatten() for factor in (0.8, 1.2))
    for index in range(900):
        patch = patches[index]["input"].numpy().transpose(1, 2, 0)
        seen = patch[patch.any(axis=2)][0]
        saturated += tuple(seen) != (200, 100, 50)
        assert weakest[0] <= seen[0] <= strongest[0] and strongest[2] <= seen[2] <= weakest[2]
        moved[patch.any(axis=2).tobytes()] += 1
    assert 240 <= saturated <= 360
    shape = picture.any(axis=2)
    flipped = [shape[::-1], shape[:, ::-1]]
    moves = [shape, *flipped, *(np.rot90(shape, k) for k in (1, 2, 3)), *map(np.rot90, flipped)]  # counter-clockwise
    shares = [moved[move.tobytes()] / 100 for move in moves]
    assert moved.total() == 100 * sum(shares) and shares == pytest.approx([2, *[1] * 7], abs=0.45)


def test_photographs_get_another_rain_in_every_epoch(tmp_path):
    write_png(tmp_path / "photo.png", np.full((40, 40, 3), 90, np.uint8))
    patches = TrainingPatches([Photo(tmp_path / "photo.png")], 32, seed=1)
    first, again, next_epoch = patches[0], patches[0], patches[1]
    assert torch.equal(first["input"], again["input"])
    assert not torch.equal(first["input"], first["target"]) and not torch.equal(first["input"], next_epoch["input"])
    assert torch.equal(first["target"], torch.full((3, 32, 32), 90, dtype=torch.uint8))


def test_validation_shows_the_centre_and_small_pictures_are_padded(grid_pairs):
    assert torch.equal(ValidationPatches(grid_pairs, 32)[2]["target"], to_uint8_tensor(grid_picture()[16:48, 16:48]))
    for patches in (TrainingPatches(grid_pairs, 96, seed=0), ValidationPatches(grid_pairs, 96)):
        assert patches[0]["input"].shape == patches[0]["target"].shape == (3, 96, 96)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_workers_or_on_an_interruption(grid_pairs, workers):
    patches = TrainingPatches(grid_pairs, 32, seed=3)
    sampler = EpochSampler(len(patches), 1, seed=3)
    loader = DataLoader(patches, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    assert len(list(loader)) == 4
    sampler.epoch = 1
    expected = [patches[index] for (index,) in sampler]
    sampler.skip = 1  # as if one batch of the epoch had been used before the interruption
    for item, original in zip(loader, expected[1:], strict=True):
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
        indices = []
        for sampler, share in zip(samplers, shares):
            own, together = sampler.counts(number)
            assert together == len(batch) and len(share[number]) == max(own, 1)
            indices += share[number][:own]
        assert sorted(indices) == sorted(batch.tolist())
    samplers[-1].skip = 1
    assert list(samplers[-1]) == shares[-1][1:]


def test_a_process_ends_though_its_workers_leave_sigterm_to_it(pairs_folder):
    """Also where a failed iteration, kept by its traceback, still has a worker at the end. The picture is named."""
    (pairs_folder / "input" / "3.png").write_bytes(b"broken")
    script = f"""
from torch.utils.data import DataLoader
from dataset_RGB import TrainingPatches, ignore_signals
from utils.pairs import find_pairs
patches = TrainingPatches(find_pairs({str(pairs_folder)!r}), 32, seed=0)
try:
    list(DataLoader(patches, num_workers=1, worker_init_fn=ignore_signals))
except Exception as error:
    kept = error
    print(type(error).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "UserError\n"), run.stderr
