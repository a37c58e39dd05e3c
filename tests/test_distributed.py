"""Several processes of torchrun: they train as a single one does, and end and resume together."""

import sys

import pytest
import torch

import train
from tests.conftest import make_pairs
from tests.test_train import arguments, assert_equal_gradients, fails, latest, run_to_end, session
from utils import devices

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python")
TWO_PROCESSES = (*TORCHRUN, sys.executable, "-u", "-c")  # run the Python code that follows
LOSING = """
import os, signal, time, train
train_step = train.Trainer.train_step

def losing(trainer, batch):
    if (trainer.rank, trainer.epoch, trainer.step) == (1, {epoch}, 2):
        {action}
    return train_step(trainer, batch)

train.Trainer.train_step = losing
train.main()
"""
APART = """
import os, sys, train
train.main([*sys.argv[1:], "--model_save_dir", sys.argv[-1] + os.environ["RANK"]])
"""


@pytest.fixture
def options(narrow_weights, tmp_path):
    """Arguments of a run on seven pairs: an epoch has two steps of three pictures, which two processes cannot share
    equally, and one of a single picture. Weights stay where they are: see assert_equal_gradients."""
    pairs = make_pairs(tmp_path / "pairs", count=7)
    return [*arguments(pairs, narrow_weights, tmp_path), "--batch_size", "3", "--num_epochs", "3", "--lr", "1e-12"]


def test_two_processes_train_as_one_on_batches_that_they_cannot_share_equally(options, tmp_path):
    """Also where --accumulate sums their gradients before they meet."""
    options += ["--num_epochs", "2", "--accumulate", "2"]
    code, output = run_to_end([*options, "--session", "b"], (*TWO_PROCESSES, "import train; train.main()"))
    assert code == 0 and "2 processes" in output, output
    train.main(options)
    assert_equal_gradients(tmp_path, ("charbonnier", "fft", "edge", "l1", "total", "val_psnr"))


def test_processes_that_are_ended_or_lost_resume(options, tmp_path):
    """SIGTERM to torchrun, then a killed process, then a single process instead of two."""
    ended = "os.kill(os.getppid(), signal.SIGTERM)\n        while not trainer.interruption.signal: time.sleep(0.01)"
    code, output = run_to_end(options, (*TWO_PROCESSES, LOSING.format(epoch=0, action=ended)))
    assert code == 1 and "The same command resumes" in output, output
    stopped = latest(session(tmp_path))
    assert (stopped["epoch"], stopped["pictures"]) == (0, 9)
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    code, output = run_to_end(options, (*TWO_PROCESSES, LOSING.format(epoch=2, action=killed)))
    assert code == 1 and "resumes after epoch 0 and 3 of 3 steps" in output, output
    assert "error: another process of this run has ended" in output
    assert latest(session(tmp_path))["epoch"] == 2
    train.main(options)
    train.main([*options, "--session", "b"])
    assert_equal_gradients(tmp_path)


@pytest.mark.slow
def test_machines_without_a_common_folder_are_stopped(options, tmp_path):
    train.main([*options, "--num_epochs", "1", "--model_save_dir", f"{tmp_path}/runs0"])
    code, output = run_to_end([*options, "--model_save_dir", f"{tmp_path}/runs"], (*TWO_PROCESSES, APART))
    assert code == 1 and "found different checkpoints: all machines must share" in output


def test_a_batch_smaller_than_the_number_of_processes_is_refused(options, monkeypatch):
    monkeypatch.setattr(devices, "start_processes", lambda gpus: (torch.device("cpu"), 0, 4))
    assert "--batch_size 3 is too small for 4 processes" in fails(options)
