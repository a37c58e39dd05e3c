"""A run that is stopped, killed, or whose files are damaged, ends as if nothing had happened."""

import json
import os
import random
import re
import signal
import sys
import time

import pytest
import torch

import train
from tests.conftest import make_pairs
from tests.test_train import ROOT, arguments, assert_equal_runs, fails, latest, lines_of, session, start
from utils.checkpoint import load_checkpoint

SAVING_OFTEN = "import train; train.SAVE_STEPS = 1; train.main()"
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


@pytest.fixture
def options(pairs_folder, narrow_weights, tmp_path):
    return [*arguments(pairs_folder, narrow_weights, tmp_path), "--no_zero_epoch", "--ema", "0.9"]


def test_a_run_that_gets_a_signal_saves_and_ends(options, tmp_path):
    run = start([*options, "--num_epochs", "60", "--num_workers", "1"])
    while not (session(tmp_path) / "log.jsonl").exists() or not lines_of(session(tmp_path)):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)  # as schedulers do: its data-loading processes get it, too
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGTERM
    assert "The same command resumes" in output and "Traceback" not in output
    assert 1 <= latest(session(tmp_path))["epoch"] < 60


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there are no such terminals here")
def test_a_closed_terminal_loses_nothing(options, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    process, terminal = pty.fork()
    if process == 0:  # the terminal is its own now
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "train.py", *options, "--num_epochs", "60"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    while not (session(tmp_path) / "log.jsonl").exists() or not lines_of(session(tmp_path)):
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert re.search(r"epoch 1/60: .*\| 3/3 .* pictures/s, run [0-9:]+ left", shown.decode())
    assert 1 <= latest(session(tmp_path))["epoch"] < 60


def signalled(monkeypatch, number, method, step):
    """Sends a signal to the run itself in the second epoch, once a method of Trainer has taken it to a step."""
    original = getattr(train.Trainer, method)

    def signalling(trainer, *args):
        if method == "validate" and trainer.epoch == 1:
            os.kill(os.getpid(), number)
        result = original(trainer, *args)
        if (trainer.epoch, trainer.step) == (1, step):
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(train.Trainer, method, signalling)


@pytest.mark.parametrize("number, method, step", [(2, "train_step", 1), (15, "train_step", 3), (2, "validate", 3)])
def test_an_interruption_loses_no_step(options, tmp_path, monkeypatch, capsys, number, method, step):
    """Within an epoch, after its last step, and in its validation."""
    options += ["--clip_grad", "0.5"]
    with monkeypatch.context() as patch:
        signalled(patch, number, method, step)
        assert fails(options) == 128 + number
    saved = latest(session(tmp_path))
    assert (saved["epoch"], saved["pictures"]) == (1, 2 * step)
    train.main(options)
    assert f"resumes after epoch 1 and {step} of 3 steps" in capsys.readouterr().out
    assert all(line.get("pictures_per_second") != 0 for line in lines_of(session(tmp_path)))
    train.main([*options, "--session", "b"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"), ("epoch", "lr", "fft", "total", "val_psnr"))


def test_a_checkpoint_of_the_former_train_py_resumes_with_other_sizes(options, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, "train_step", 2)
        assert fails(options) == 130
    former = latest(session(tmp_path)) | {"usual_loss": None}
    del former["digest"]
    torch.save(former, session(tmp_path) / "model_latest.pth")
    options += ["--batch_size", "1", "--patch_size", "48"]
    train.main(options)
    output = capsys.readouterr().out
    assert "resumes after epoch 1 and 4 of 6 steps" in output
    assert "model_best.pth is chosen anew, from epoch 2 on" in output
    states = latest(session(tmp_path))["optimizer"]["state"].values()
    assert {state["step"].item() for state in states} == {3 + 2 + 2}


def test_a_run_killed_while_it_saves_resumes(options, tmp_path):
    """With a whole file that is not yet in place, after the last one was moved away, and before that."""
    for name, path, number in (("fsync", "", 6), ("replace", "model_latest.pth", 2), ("replace", "previous.pth", 2)):
        run = start(options, launcher=("-c", KILLED.format(name=name, path=path, number=number)))
        output, _ = run.communicate(timeout=300)
        assert run.returncode == -signal.SIGKILL, output
        assert list(session(tmp_path).glob(".*.tmp"))
    train.main(options)
    assert not list(session(tmp_path).glob(".*"))
    train.main([*options, "--session", "b"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"))


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_resumes(options, tmp_path):
    options += ["--num_epochs", "60", "--val_epochs", "20"]
    random_moments, saving = random.Random(0), 0
    folder = session(tmp_path)
    for number in range(20):
        starts = (folder / "runs.jsonl").read_text().count("\n") if number else 0
        run = start([*options, "--num_workers", "1"], launcher=("-c", SAVING_OFTEN))
        while not (folder / "runs.jsonl").exists() or (folder / "runs.jsonl").read_text().count("\n") == starts:
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.01)
        time.sleep(random_moments.uniform(0, 0.8))
        while number % 2 and not list(folder.glob(".model_latest.pth.*.tmp")):  # every other time, while it saves
            assert run.poll() is None, run.stdout.read()
        os.kill(run.pid, signal.SIGKILL)  # its data-loading process has to notice by itself
        assert run.wait() == -signal.SIGKILL
        saving += bool(list(folder.glob(".model_latest.pth.*.tmp")))
    assert saving >= 4
    train.main(options)
    train.main([*options, "--session", "b"])
    assert_equal_runs(folder, session(tmp_path, "b"))


def test_a_run_resumes_from_the_checkpoint_before(options, tmp_path, capsys):
    train.main(options)
    os.truncate(session(tmp_path) / "model_latest.pth", 1000)
    train.main([*options, "--num_epochs", "3"])
    output = capsys.readouterr().out
    assert f"warning: {session(tmp_path) / 'model_latest.pth'} cannot be read as a checkpoint" in output
    assert f"Resuming from {session(tmp_path) / 'model_previous.pth'}" in output
    assert "resumes after epoch 1 and 0 of 3 steps" in output
    assert (session(tmp_path) / "model_damaged.pth").stat().st_size == 1000
    assert load_checkpoint(session(tmp_path) / "model_previous.pth")["epoch"] == 2
    train.main([*options, "--num_epochs", "3", "--session", "b"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"), ("epoch", "total"))


def test_a_finished_run_can_be_prolonged_and_names_what_changed(options, tmp_path, capsys):
    options += ["--num_epochs", "1", "--batch_size", "6"]
    train.main(options)
    before = (session(tmp_path) / "log.jsonl").read_text()
    train.main(options)
    output = capsys.readouterr().out
    assert "all 1 epochs are done; raise --num_epochs to continue" in output and "changed since" not in output
    assert (session(tmp_path) / "log.jsonl").read_text() == before
    with open(session(tmp_path) / "runs.jsonl", "a") as file:
        file.write('{"time": ')  # a power cut
    content = latest(session(tmp_path))
    torch.save(content | {"best_psnr": 99.0}, session(tmp_path) / "model_latest.pth")
    other = ["--val_dir", str(make_pairs(tmp_path / "other", count=1, seed=1))]
    train.main([*options, "--num_epochs", "2", "--clip_grad", "1", *other])
    output = capsys.readouterr().out
    assert "--num_epochs 2 (was 1)\n" in output and "--clip_grad 1.0 (was None)\n" in output
    assert "model_best.pth is chosen anew, from epoch 2" in output
    assert [line["epoch"] for line in lines_of(session(tmp_path))] == [1, 2]
    assert latest(session(tmp_path))["best_epoch"] == 2
    lines = (session(tmp_path) / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["arguments"]["num_epochs"] for line in lines] == [1, 1, 2]


def test_a_session_keeps_to_its_data(options, tmp_path, pairs_folder):
    options += ["--batch_size", "6", "--num_epochs", "1"]
    train.main(options)
    before = latest(session(tmp_path))["epoch"]
    more = ["--num_epochs", "2", "--clean_dir", str(pairs_folder / "target")]
    assert "was trained on other pictures than there are now" in fails([*options, *more])
    moved = pairs_folder.rename(tmp_path / "moved")
    train.main([*options, "--train_dir", os.path.relpath(moved)])
    for folder in ("input", "target"):
        (moved / folder / "5.png").unlink()
    assert "choose another --session" in fails([*options, "--train_dir", str(moved), "--num_epochs", "2"])
    assert latest(session(tmp_path))["epoch"] == before


def test_a_second_run_of_a_session_is_refused_until_the_first_is_gone(options, tmp_path):
    script = f"""
import os, time
from pathlib import Path
from utils.files import lock
file = lock(Path({str(session(tmp_path) / "lock")!r}))
if os.fork():  # as data-loading processes, which outlive a killed run, do
    print("locked", flush=True)
time.sleep(600)
"""
    first = start([], launcher=("-c", script))
    try:
        assert first.stdout.readline() == "locked\n"
        assert f"another run trains in {session(tmp_path)}" in fails(options)
        assert [path.name for path in session(tmp_path).iterdir()] == ["lock"]
        os.kill(first.pid, signal.SIGKILL)
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
        with open("/proc/self/status") as status:
            memory = next(int(entry.split()[1]) / 1024 for entry in status if entry.startswith("VmRSS"))
        measured.append((memory, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train.Trainer, "finish_epoch", measure)
    clean = ("--clean_dir", str(tmp_path / "pairs" / "target"), "--clean_repeats", "32")  # 198 pictures with the pairs
    train.main([*options, *clean, "--num_epochs", "21", "--num_workers", "1"])
    assert measured[-1][0] < 1.05 * measured[1][0]
    assert measured[-1][1] == measured[1][1]
