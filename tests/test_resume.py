"""A run that is stopped, killed, or whose files are damaged, ends as if nothing had happened."""

import fcntl
import os
import random
import re
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

import train
from tests.test_train import ROOT, arguments, assert_equal_runs, fails, latest, lines_of, run_to_end, session, start
from utils.checkpoint import load_checkpoint, save_checkpoint

KILLED = """
import os, signal, train
train.SAVE_STEPS, calls, function = 1, 0, os.{name}

def killed(*args):
    global calls
    calls += str(args[-1]).endswith("{path}")
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

os.{name} = killed
train.main()
"""
HOLDING_THE_LOCK = """
import os, pathlib, sys, time, utils.files
file = utils.files.lock(pathlib.Path(sys.argv[1]))
if os.fork():  # as data-loading processes, which outlive a killed run, do
    print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def options(pairs_folder, narrow_weights, tmp_path):
    return [*arguments(pairs_folder, narrow_weights, tmp_path), "--no_zero_epoch", "--ema", "0.9"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_saves_and_ends_when_it_is_asked_to_or_its_terminal_is_closed(options, tmp_path, number):
    process, terminal = os.forkpty()
    if process == 0:  # the terminal is its own now
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the suite runs under nohup
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "train.py", *options, "--num_epochs", "1000", "--num_workers", "1"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    while b"dB in epoch 1" not in shown:
        shown += os.read(terminal, 4096)
    if number == signal.SIGTERM:  # as schedulers do: its data-loading process gets it, too
        os.killpg(process, signal.SIGTERM)
        while b"The same command resumes" not in shown:
            shown += os.read(terminal, 4096)
    if number == signal.SIGHUP:
        os.close(terminal)
    status = os.waitpid(process, 0)[1]
    if number == signal.SIGTERM:  # not before: Python that is ending no longer catches SIGHUP
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 128 + number and b"Traceback" not in shown
    assert re.search(r"epoch 1/1000: .*\| 3/3 .* pictures/s, run [0-9:]+ left", shown.decode())
    assert latest(session(tmp_path))["epoch"] >= 1


def signalled(monkeypatch, number, method, step):
    """Sends a signal to the run itself in the second epoch, where it calls a method of Trainer after some steps."""
    original = getattr(train.Trainer, method)

    def signalling(trainer, *args):
        if (trainer.epoch, trainer.step) == (1, step):
            os.kill(os.getpid(), number)
        return original(trainer, *args)

    monkeypatch.setattr(train.Trainer, method, signalling)


@pytest.mark.parametrize("number, method, step", [(2, "check_losses", 1), (15, "check_losses", 3), (2, "validate", 3)])
def test_an_interruption_loses_no_step(options, tmp_path, monkeypatch, capsys, number, method, step):
    """Within an epoch, after its last step, and in its validation."""
    options += ["--clip_grad", "0.5"]
    with monkeypatch.context() as patch:
        signalled(patch, number, method, step)
        assert fails(options) == str(128 + number)
    saved = latest(session(tmp_path))
    assert (saved["epoch"], saved["pictures"]) == (1, 2 * step)
    train.main(options)
    assert f"resumes after epoch 1 and {step} of 3 steps" in capsys.readouterr().out
    assert all(line.get("pictures_per_second") != 0 for line in lines_of(session(tmp_path)))
    train.main([*options, "--session", "b"])
    assert_equal_runs(tmp_path, ("epoch", "lr", "fft", "total", "val_psnr"))


@pytest.mark.parametrize("make", [os.openpty, os.pipe])
def test_a_closed_terminal_or_pipe_fails_nothing(make):
    ours, theirs = make()
    os.close(ours)
    assert train.Output(theirs, "w").write(b"epoch") == 5


def test_a_run_resumes_with_another_batch_size(options, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, "check_losses", 2)
        assert fails(options) == "130"
    train.main([*options, "--batch_size", "1"])
    assert "resumes after epoch 1 and 4 of 6 steps" in capsys.readouterr().out
    states = latest(session(tmp_path))["optimizer"]["state"].values()
    assert {state["step"].item() for state in states} == {3 + 2 + 2}


def test_a_run_killed_while_it_saves_resumes(options, tmp_path):
    """With a whole file that is not yet in place, after the last one was moved away, and before that."""
    for name, path, number in (("fsync", "", 6), ("replace", "model_latest.pth", 2), ("replace", "previous.pth", 2)):
        code, output = run_to_end(options, launcher=("-c", KILLED.format(name=name, path=path, number=number)))
        assert code == -signal.SIGKILL, output
        for path in (left := list(session(tmp_path).glob(".*.tmp"))):
            os.utime(path, (0, 0))  # it is removed after a day
        assert left
    train.main(options)
    assert not list(session(tmp_path).glob(".*"))
    train.main([*options, "--session", "b"])
    assert_equal_runs(tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_resumes(options, tmp_path):
    options += ["--num_epochs", "60", "--val_epochs", "20"]
    saving_often, moments = "import train; train.SAVE_STEPS = 1; train.main()", random.Random(0)
    for _ in range(20):
        run = start([*options, "--num_workers", "1"], launcher=("-u", "-c", saving_often))
        assert run.stdout.readline()  # it begins
        time.sleep(moments.uniform(0, 0.8))
        run.kill()  # its data-loading process has to notice by itself
        run.wait()
    train.main(options)
    train.main([*options, "--session", "b"])
    assert_equal_runs(tmp_path)


def test_a_run_resumes_from_the_checkpoint_before(options, tmp_path, capsys):
    newest, previous, damaged = (session(tmp_path) / f"model_{name}.pth" for name in ("latest", "previous", "damaged"))
    train.main(options)
    os.truncate(newest, 1000)
    options += ["--num_epochs", "3"]
    train.main(options)
    output = capsys.readouterr().out
    assert f"warning: {newest} cannot be read as a checkpoint" in output and f"Resuming from {previous}" in output
    assert "resumes after epoch 1 and 0 of 3 steps" in output
    assert damaged.stat().st_size == 1000 and load_checkpoint(previous)["epoch"] == 2
    train.main([*options, "--session", "b"])
    assert_equal_runs(tmp_path, ("epoch", "total"))


def test_a_finished_run_can_be_prolonged_and_names_what_changed(options, tmp_path, capsys):
    options += ["--num_epochs", "1", "--batch_size", "6"]
    folder = session(tmp_path)
    train.main(options)
    train.main(options)
    output = capsys.readouterr().out
    assert "all 1 epochs are done; raise --num_epochs to continue" in output and "changed since" not in output
    with open(folder / "runs.jsonl", "a") as file:
        file.write('{"time": ')  # a power cut
    save_checkpoint(folder / "model_latest.pth", **latest(folder) | {"best_psnr": 99.0})
    for kind in ("input", "target"):
        (tmp_path / "val" / kind / "1.png").unlink()
    train.main([*options, "--num_epochs", "2", "--clip_grad", "1"])
    output = capsys.readouterr().out
    assert "--num_epochs 2 (was 1)\n" in output and "--clip_grad 1.0 (was None)\n" in output
    assert "model_best.pth is chosen anew, from epoch 2" in output and latest(folder)["best_epoch"] == 2
    assert [line["epoch"] for line in lines_of(folder)] == [1, 2]
    assert [run["arguments"]["num_epochs"] for run in lines_of(folder, "runs.jsonl")] == [1, 1, 2]


def test_a_session_keeps_to_its_data(options, tmp_path, pairs_folder, capsys):
    options += ["--batch_size", "6", "--num_epochs", "1"]
    train.main(options)
    more = ["--num_epochs", "2", "--clean_dir", str(pairs_folder / "target")]
    assert "was trained on other pictures than there are now" in fails([*options, *more])
    moved = pairs_folder.rename(tmp_path / "moved")
    options += ["--val_dir", str((tmp_path / "val").rename(tmp_path / "moved_val"))]
    train.main([*options, "--train_dir", os.path.relpath(moved)])
    assert "chosen anew" not in capsys.readouterr().out
    picture = moved / "input" / "5.png"
    picture.write_bytes(picture.read_bytes() + b"0")  # as in another data set with the same names
    assert "was trained on other pictures than there are now" in fails([*options, "--train_dir", str(moved)])
    for folder in ("input", "target"):
        (moved / folder / "5.png").unlink()
    assert "choose another --session" in fails([*options, "--train_dir", str(moved), "--num_epochs", "2"])
    assert latest(session(tmp_path))["epoch"] == 1


def test_a_second_run_of_a_session_is_refused_until_the_first_is_gone(options, tmp_path):
    first = start([str(session(tmp_path) / "lock")], launcher=("-c", HOLDING_THE_LOCK))
    try:
        assert first.stdout.readline() == "locked\n"
        assert f"another run trains in {session(tmp_path)}" in fails(options)
        assert [path.name for path in session(tmp_path).iterdir()] == ["lock"]
        first.kill()
        first.wait()
        train.main([*options, "--num_epochs", "1"])
    finally:
        os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads memory and files from /proc")
def test_2000_steps_keep_memory_and_files_flat(options, tmp_path, monkeypatch):
    finish, measured = train.Trainer.finish_epoch, []

    def measure(trainer, line):
        finish(trainer, line)
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        measured.append((resident_pages, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train.Trainer, "finish_epoch", measure)
    clean = ("--clean_dir", str(tmp_path / "pairs" / "target"), "--clean_repeats", "32")  # 198 pictures with the pairs
    train.main([*options, *clean, "--num_epochs", "21", "--num_workers", "1"])
    assert measured[-1][0] < 1.05 * measured[1][0]
    assert measured[-1][1] == measured[1][1]
