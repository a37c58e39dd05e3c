"""A run that is killed, or whose files are damaged, ends as if nothing had happened."""

import json
import os
import random
import signal
import time

import pytest
import torch

import train
from tests.conftest import make_pairs
from tests.test_train_script import arguments, assert_equal_runs, assert_equal_weights, fails, session, start
from utils.checkpoint import load_checkpoint, load_newest, save_checkpoint
from utils.errors import UserError

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
    return arguments(pairs_folder, narrow_weights, tmp_path)


def test_a_run_killed_while_it_saves_goes_on(options, tmp_path):
    """With a whole file that is not yet in place, after the last one was moved away, and before that."""
    for name, path, number in (("fsync", "", 4), ("replace", "model_latest.pth", 5), ("replace", "previous.pth", 2)):
        run = start(options, launcher=("-c", KILLED.format(name=name, path=path, number=number)))
        output, _ = run.communicate(timeout=120)
        assert run.returncode == -signal.SIGKILL, output
        assert list(session(tmp_path).glob(".*.tmp"))
    train.main(options)
    assert not list(session(tmp_path).glob(".*"))
    train.main([*options, "--session", "b"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"))


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_goes_on(options, tmp_path):
    options += ["--num_epochs", "60", "--val_epochs", "20", "--ema", "0.9"]
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
    averaged, other = (load_checkpoint(session(tmp_path, name) / "model_latest.pth")["ema"] for name in "ab")
    assert all(tensor.equal(other[name]) for name, tensor in averaged.items())


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path.with_name("made")),)


def flip_a_bit(path):
    content = path.read_bytes()
    bias = next(weight for weight in load_checkpoint(path)["state_dict"].values() if weight.ndim == 1)
    place = content.index(bias.numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one bit": flip_a_bit,
    "malicious": lambda path: torch.save({"state_dict": Malice(path)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, narrow_weights, damage):
    latest, previous = tmp_path / "model_latest.pth", tmp_path / "model_previous.pth"
    assert load_newest(latest, previous) == (None, {}, [])
    for epoch in (1, 2):
        save_checkpoint(latest, previous, epoch=epoch, state_dict=load_checkpoint(narrow_weights)["state_dict"])
    path, content, errors = load_newest(latest, previous)
    assert (path, content["epoch"], errors) == (latest, 2, [])
    DAMAGES[damage](latest)
    path, content, (error,) = load_newest(latest, previous)
    assert (path, content["epoch"]) == (previous, 1) and str(error).startswith(f"{latest} cannot be read")
    DAMAGES[damage](previous) if damage != "one bit" else os.truncate(previous, 9)
    with pytest.raises(UserError) as caught:
        load_newest(latest, previous)
    for part in (f"{latest} cannot be read", f"{previous} cannot be read", "--pretrain_weights model_best.pth"):
        assert part in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_run_goes_on_from_the_checkpoint_before(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "2"])
    os.truncate(session(tmp_path) / "model_latest.pth", 1000)
    capsys.readouterr()
    train.main(options)
    output = capsys.readouterr().out
    assert f"warning: {session(tmp_path) / 'model_latest.pth'} cannot be read as a checkpoint" in output
    assert f"Going on from {session(tmp_path) / 'model_previous.pth'}" in output
    assert "continues after epoch 1 and 0 of 3 steps" in output
    assert (session(tmp_path) / "model_damaged.pth").stat().st_size == 1000
    assert load_checkpoint(session(tmp_path) / "model_previous.pth")["epoch"] == 2
    train.main([*options, "--session", "b"])
    assert_equal_weights(session(tmp_path), session(tmp_path, "b"))


def test_changed_arguments_are_named(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "1"])
    train.main([*options, "--num_epochs", "1"])
    assert "changed since" not in capsys.readouterr().out
    with open(session(tmp_path) / "runs.jsonl", "a") as file:
        file.write('{"time": ')  # a power cut
    train.main([*options, "--num_epochs", "2", "--clip_grad", "1"])
    output = capsys.readouterr().out
    assert "changed since the last start: --num_epochs 2 (was 1), --clip_grad 1.0 (was None)\n" in output
    train.main([*options, "--num_epochs", "2", "--clip_grad", "1"])
    assert "changed since" not in capsys.readouterr().out
    lines = (session(tmp_path) / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["arguments"]["num_epochs"] for line in lines] == [1, 1, 2, 2]


def test_other_validation_pictures_choose_the_best_anew(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "1"])
    latest = session(tmp_path) / "model_latest.pth"
    content = load_checkpoint(latest)
    torch.save(content | {"best_psnr": 99.0}, latest)
    other = ["--val_dir", str(make_pairs(tmp_path / "other", count=2, seed=1))]
    train.main([*options, "--num_epochs", "2", *other])
    assert "model_best.pth is chosen anew, from epoch 2 on" in capsys.readouterr().out
    assert load_checkpoint(latest)["best_epoch"] == 2
    with pytest.raises(SystemExit, match=r"was trained with --hold_out None, not 0\.3"):
        train.main([*options, "--num_epochs", "3", *other, "--hold_out", "0.3"])


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
def test_2000_steps_keep_memory_and_files_flat(options, tmp_path, monkeypatch, capsys):
    finish, measured = train.Trainer.finish_epoch, []

    def measure(trainer, line):
        finish(trainer, line)
        with open("/proc/self/status") as status:
            memory = next(int(entry.split()[1]) / 1024 for entry in status if entry.startswith("VmRSS"))
        measured.append((memory, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train.Trainer, "finish_epoch", measure)
    clean = ("--clean_dir", str(tmp_path / "pairs" / "target"), "--clean_repeats", "32")  # 198 pictures with the pairs
    train.main([*options, *clean, "--num_epochs", "21", "--num_workers", "1", "--ema", "0.9"])
    with capsys.disabled():
        print(f"\nafter 99 and {99 * len(measured)} steps: MiB of memory and open files {measured[0]}, {measured[-1]}")
    assert measured[-1][0] < 1.05 * measured[1][0]
    assert measured[-1][1] == measured[1][1]
