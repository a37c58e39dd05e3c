"""Several processes of torchrun: they train as a single one does, and end and go on together."""

import pytest
import torch

import train
from tests.conftest import make_pairs
from tests.test_train_script import lines_of, session, start, weights_of
from utils.checkpoint import load_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py")


@pytest.fixture
def options(narrow_weights, tmp_path):
    """Arguments of a run on seven small pairs: an epoch has two steps of three pictures, which two processes cannot
    share equally, and one of a single picture."""
    pairs = str(make_pairs(tmp_path / "pairs", count=7))
    return [
        *("--train_dir", pairs, "--val_dir", pairs, "--model_save_dir", str(tmp_path / "runs"), "--session", "a"),
        *("--pretrain_weights", str(narrow_weights), "--patch_size", "32", "--batch_size", "3"),
        *("--num_epochs", "4", "--num_workers", "0"),
    ]


def assert_close_weights(folder, other):
    first, second = weights_of(folder), weights_of(other)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-6)


def momenta_of(folder):
    """Adam's first moments: sums of the gradients of all steps so far."""
    states = load_checkpoint(folder / "model_latest.pth")["optimizer"]["state"].values()
    return [state["exp_avg"] for state in states]


def test_two_processes_train_as_one_on_batches_that_they_cannot_share_equally(options, tmp_path):
    run = start([*options, "--session", "b"], TORCHRUN)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert "2 processes" in output
    train.main(options)
    assert_close_weights(session(tmp_path), session(tmp_path, "b"))
    for first, second in zip(*(momenta_of(session(tmp_path, name)) for name in "ab")):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    for line, other in zip(lines_of(session(tmp_path)), lines_of(session(tmp_path, "b"))):
        for key in ("charbonnier", "fft", "edge", "l1", "total", "val_psnr"):
            assert line[key] == pytest.approx(other[key], rel=1e-5)
