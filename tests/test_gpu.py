"""What only a GPU can tell: `make test-gpu`. tests/test_model.py compares the networks' outputs with the reference."""

import numpy as np
import pytest
import torch

import train
from tests.test_train import arguments
from utils.checkpoint import load_network
from utils.derain import Derainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("change", [[], ["--ablation", "mprnet"], ["--ablation", "inr_coordinate_random"]])
def test_a_training_step_never_waits_for_the_gpu(pairs_folder, tmp_path, change, bf16):
    options = [*arguments(pairs_folder, None, tmp_path), "--num_blocks", "1", "1", "1", "--gpus", "0", "--ema", "0.9"]
    trainer = train.Trainer(train.parse_args([*options, *change, "--clip_grad", "1", *["--bf16"] * bf16]))
    first, *others = trainer.train_loader
    assert first["input"].is_pinned() and first["target"].is_pinned()  # copies that do not wait need it
    trainer.train_step(first)  # cuDNN chooses algorithms, Adam makes its state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in others:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_weights()


def test_compiled_training_computes_the_same_losses(tmp_path, narrow_weights, pairs_folder):
    losses = []
    for name, option in (("eager", []), ("compiled", ["--compile"])):
        options = [*arguments(pairs_folder, narrow_weights, tmp_path), "--gpus", "0", "--no_zero_epoch", *option]
        trainer = train.Trainer(train.parse_args([*options, "--session", name]))
        assert not option or trainer.forward is not trainer.parallel  # it did not fall back
        losses.append(trainer.train_epoch()["total"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", ["window", "tile"])
def test_pictures_are_derained_as_on_the_cpu(narrow_weights, monkeypatch, mode, compile):
    monkeypatch.setattr("utils.derain.GPU_PIXELS", 4 * 32 * 32)  # several batches
    rng, sizes = np.random.default_rng(0), ((64, 96), (40, 72), (100, 64), (24, 50)) * 3
    pictures = list(enumerate(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes))
    expected = list(Derainer(load_network(narrow_weights), mode, window=32).stream(pictures))
    derainer = Derainer(load_network(narrow_weights).cuda(), mode, window=32, compile=compile)
    assert bool(derainer.compiled) == compile
    for (number, result), (_, wanted) in zip(derainer.stream(pictures), expected, strict=True):
        assert np.abs(result.astype(int) - wanted).max() <= 1, number  # values halfway between two levels
