"""Several processes of torchrun: they train as a single one does, and end and go on together."""

import pytest
import torch

import train
from tests.conftest import make_pairs
from tests.test_train_script import ROOT, arguments, fails, lines_of, session, start
from utils.checkpoint import load_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PREPARED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
"""
LOSING = """
train_step = train.Trainer.train_step

def losing(trainer, *args, **options):
    if (trainer.rank, trainer.epoch, trainer.step) == (1, {epoch}, 2):
        {action}
    return train_step(trainer, *args, **options)

train.Trainer.train_step = losing
train.main()
"""
APART = """
train.main([*sys.argv[1:], "--model_save_dir", sys.argv[-1] + os.environ["RANK"]])
"""


@pytest.fixture
def options(narrow_weights, tmp_path):
    """Arguments of a run on seven pairs: an epoch has two steps of three pictures, which two processes cannot share
    equally, and one of a single picture.

    Adam makes a full step of a gradient near zero, whose sign is rounding. At this rate weights stay where they are,
    and its moments are sums over the same gradients in any division of the work."""
    pairs = make_pairs(tmp_path / "pairs", count=7)
    return [*arguments(pairs, narrow_weights, tmp_path), "--batch_size", "3", "--num_epochs", "3", "--lr", "1e-12"]


def assert_equal_gradients(folder, other, keys=("total",)):
    """Two sessions took the same steps: Adam's moments, sums over the gradients of all of them and over their squares,
    and the logged losses differ by rounding alone."""
    first, second = (load_checkpoint(path / "model_latest.pth")["optimizer"]["state"] for path in (folder, other))
    for number, state in first.items():
        for name in ("exp_avg", "exp_avg_sq"):
            bound = 1e-3 * state[name].abs().max().item()
            torch.testing.assert_close(second[number][name], state[name], rtol=1e-3, atol=bound)
    for line, same in zip(lines_of(folder), lines_of(other), strict=True):
        assert [line[key] for key in keys] == pytest.approx([same[key] for key in keys], rel=1e-5)


def test_two_processes_train_as_one_on_batches_that_they_cannot_share_equally(options, tmp_path):
    run = start([*options, "--session", "b"], (*TORCHRUN, "train.py"))
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert "2 processes" in output
    train.main(options)
    keys = ("charbonnier", "fft", "edge", "l1", "total", "val_psnr")
    assert_equal_gradients(session(tmp_path), session(tmp_path, "b"), keys)


def test_processes_that_are_ended_or_lost_go_on(options, tmp_path):
    """SIGTERM to torchrun, then a killed process, then a single process instead of two."""
    options += ["--num_epochs", "5"]
    script = tmp_path / "losing.py"

    def lose(epoch, action):
        script.write_text((PREPARED + LOSING).format(root=str(ROOT), epoch=epoch, action=action))
        run = start(options, (*TORCHRUN, str(script)))
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 1, output  # torchrun's own
        return output

    output = lose(1, "os.kill(os.getppid(), signal.SIGTERM)")
    assert "The same command goes on from here" in output
    stopped = load_checkpoint(session(tmp_path) / "model_latest.pth")
    assert (stopped["epoch"], stopped["pictures"]) >= (1, 6)
    output = lose(3, "os.kill(os.getpid(), signal.SIGKILL)")
    assert f"continues after epoch {stopped['epoch']} and {stopped['pictures'] // 3} of 3 steps" in output
    assert "error: another process of this run has ended" in output
    assert load_checkpoint(session(tmp_path) / "model_latest.pth")["epoch"] == 3
    train.main(options)
    train.main([*options, "--session", "b"])
    assert_equal_gradients(session(tmp_path), session(tmp_path, "b"))


@pytest.mark.slow
def test_machines_without_a_common_folder_are_stopped(options, tmp_path):
    script = tmp_path / "apart.py"
    script.write_text(PREPARED.format(root=str(ROOT)) + APART)
    train.main([*options, "--num_epochs", "1", "--model_save_dir", f"{tmp_path}/runs0"])
    run = start([*options, "--model_save_dir", f"{tmp_path}/runs"], (*TORCHRUN, str(script)))
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 1 and "found different checkpoints: all machines must share" in output


def test_a_batch_smaller_than_the_number_of_processes_is_refused(options, monkeypatch):
    monkeypatch.setattr(train, "start_processes", lambda: (torch.device("cpu"), 0, 4))
    assert "--batch_size 3 is too small for 4 processes" in fails(options)
