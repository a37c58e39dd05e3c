import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dataset_RGB import DATASETS, TrainingPatches, find_pairs
from tests.conftest import make_pairs
from utils.checkpoint import load_checkpoint, load_network, network_name, save_checkpoint

ROOT = Path(__file__).parent.parent


def arguments(pairs, weights, folder):
    """Arguments of a run on small pairs with a narrow network, below `folder`; six pairs make three steps an epoch."""
    return [
        *("--train_dir", str(pairs), "--val_dir", str(pairs), "--model_save_dir", str(folder / "runs")),
        *("--pretrain_weights", str(weights), "--session", "a", "--patch_size", "32", "--batch_size", "2"),
        *("--num_epochs", "3", "--num_workers", "0"),
    ]


@pytest.fixture
def options(pairs_folder, narrow_weights, tmp_path):
    return arguments(pairs_folder, narrow_weights, tmp_path)


def session(tmp_path, name="a"):
    return tmp_path / "runs" / "Deraininig" / "models" / name


def start(options, launcher=("train.py",)):
    command = [sys.executable, *launcher, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def weights_of(folder):
    return load_checkpoint(folder / "model_latest.pth")["state_dict"]


def assert_equal_weights(folder, other):
    first, second = weights_of(folder), weights_of(other)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(folder, other, keys=("total",), weights=0, losses=1e-12):
    """Two sessions end with the same weights, up to an absolute difference, and logged the same numbers, up to a
    relative one."""
    first, second = weights_of(folder), weights_of(other)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=weights)
    for line, same in zip(lines_of(folder), lines_of(other), strict=True):
        assert [line[key] for key in keys] == pytest.approx([same[key] for key in keys], rel=losses)


def test_a_run_leaves_checkpoints_logs_and_a_record(options, tmp_path, narrow_weights):
    train.main([*options, "--ema", "0.9"])
    folder = session(tmp_path)
    latest, best = (load_checkpoint(folder / f"model_{which}.pth") for which in ("latest", "best"))
    lines = lines_of(folder)
    assert latest["epoch"] == 3 and {"state_dict", "optimizer", "ema"} <= latest.keys()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx([0, 1e-4 / 3, 2e-4 / 3])
    assert best["best_psnr"] == max(line["val_psnr"] for line in lines)
    assert best["epoch"] == next(line["epoch"] for line in lines if line["val_psnr"] == best["best_psnr"])
    for line in lines:
        weighted = line["charbonnier"] + 0.01 * line["fft"] + 0.05 * line["edge"] + 0.1 * line["l1"]
        assert line["total"] == pytest.approx(weighted, rel=1e-5)
    run = json.loads((folder / "runs.jsonl").read_text())
    assert run["arguments"]["patch_size"] == 32 and run["torch"] == torch.__version__
    assert {"commit", "device", "time", "command"} <= run.keys()
    initial = load_checkpoint(narrow_weights)["state_dict"]
    moved = {name for name, tensor in latest["state_dict"].items() if not torch.equal(tensor, initial[name])}
    assert moved == initial.keys() - {"reduce_chan_level1_max3.weight"}
    board = EventAccumulator(str(folder)).Reload()
    expected = {"lr", "val_psnr", "pictures_per_second", "charbonnier", "fft", "edge", "l1", "total"}
    assert {f"epoch/{name}" for name in expected} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["rainy, derained, clean"]
    assert network_name(load_network(folder / "model_best.pth")).startswith("a network of width 8")


def test_training_lowers_the_loss(options, tmp_path):
    train.main([*options, "--num_epochs", "12", "--lr", "1e-3", "--val_epochs", "12"])
    lines = lines_of(session(tmp_path))
    assert lines[-1]["total"] < 0.9 * lines[0]["total"]
    assert [line["epoch"] for line in lines if "val_psnr" in line] == [12]


def test_saving_memory_changes_no_weight(options, tmp_path):
    train.main([*options, "--ema", "0.9"])
    train.main([*options, "--ema", "0.9", "--session", "b", "--save_memory"])
    assert_equal_weights(session(tmp_path), session(tmp_path, "b"))


def test_interrupted_runs_end_with_the_weights_of_an_uninterrupted_one(options, tmp_path):
    options += ["--num_epochs", "10", "--val_epochs", "10"]
    train.main(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = session(tmp_path, number.name)
        interrupted = [*options, "--session", number.name]
        run = start([*interrupted, "--num_workers", "1"])
        while not (folder / "log.jsonl").exists() or len(lines_of(folder)) < 3:
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.02)
        os.killpg(run.pid, number)  # as terminals and schedulers do: its data-loading processes get it, too
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 128 + number
        assert "The same command goes on from here" in output and "Traceback" not in output
        assert 2 <= load_checkpoint(folder / "model_latest.pth")["epoch"] < 10
        train.main(interrupted)
        keys = ("epoch", "lr", "charbonnier", "fft", "edge", "l1", "total")
        assert_equal_runs(folder, session(tmp_path), keys, losses=1e-9)
        assert len(lines_of(folder)) == 10


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there are no such terminals here")
def test_a_closed_terminal_loses_nothing(options, tmp_path):
    import pty

    process, terminal = pty.fork()
    if process == 0:  # the terminal is its own now
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "train.py", *options, "--num_epochs", "60", "--num_workers", "1"])
    while not (session(tmp_path) / "log.jsonl").exists() or len(lines_of(session(tmp_path))) < 3:
        os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    saved = load_checkpoint(session(tmp_path) / "model_latest.pth")
    assert 3 <= saved["epoch"] + saved["pictures"] / 100 < 60


def test_an_interruption_within_an_epoch_loses_no_step(options, tmp_path, monkeypatch, capsys):
    finished = train.Trainer.train_step

    def ask_after_step_4(trainer, *args, **options):
        values = finished(trainer, *args, **options)
        if trainer.epoch == 1 and trainer.step == 1:
            trainer.interruption.ask(signal.SIGINT, None)
        return values

    monkeypatch.setattr(train.Trainer, "train_step", ask_after_step_4)
    with pytest.raises(SystemExit) as caught:
        train.main([*options, "--ema", "0.9"])
    assert caught.value.code == 130
    checkpoint = load_checkpoint(session(tmp_path) / "model_latest.pth")
    assert (checkpoint["epoch"], checkpoint["pictures"]) == (1, 2)
    monkeypatch.undo()
    train.main([*options, "--ema", "0.9"])
    assert "continues after epoch 1 and 1 of 3 steps" in capsys.readouterr().out
    train.main([*options, "--ema", "0.9", "--session", "b"])
    assert_equal_weights(session(tmp_path), session(tmp_path, "b"))
    a, b = (load_checkpoint(session(tmp_path, name) / "model_latest.pth")["ema"] for name in "ab")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert lines_of(session(tmp_path))[1]["total"] == pytest.approx(lines_of(session(tmp_path, "b"))[1]["total"])


def test_a_finished_run_can_be_prolonged_and_is_not_repeated(options, tmp_path):
    train.main(options)
    before = (session(tmp_path) / "log.jsonl").read_text()
    train.main(options)
    assert (session(tmp_path) / "log.jsonl").read_text() == before
    train.main([*options, "--num_epochs", "4"])
    assert [line["epoch"] for line in lines_of(session(tmp_path))] == [1, 2, 3, 4]


def test_a_session_keeps_to_its_data(options, tmp_path, pairs_folder, capsys):
    train.main([*options, "--num_epochs", "1"])
    others = str(make_pairs(tmp_path / "others", count=6, seed=2))
    message = fails([*options, "--train_dir", others, "--num_epochs", "2"])
    assert "choose another --session" in message and str(pairs_folder) in message and others in message
    assert load_checkpoint(session(tmp_path) / "model_latest.pth")["epoch"] == 1
    capsys.readouterr()
    train.main([*options, "--train_dir", os.path.relpath(pairs_folder), "--num_epochs", "1"])
    assert "nothing is left to do of 1 epoch" in capsys.readouterr().out
    (session(tmp_path) / "runs.jsonl").unlink()
    train.main([*options, "--train_dir", others, "--num_epochs", "2"])


def test_accumulated_batches_take_the_steps_of_larger_ones(options, tmp_path):
    train.main([*options, "--batch_size", "6"])
    train.main([*options, "--batch_size", "1", "--accumulate", "6", "--session", "b"])
    first, second = weights_of(session(tmp_path)), weights_of(session(tmp_path, "b"))
    steps = {state["step"].item() for state in optimizer_states(tmp_path, "b")}
    assert steps == {3}
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-5)


def optimizer_states(tmp_path, name):
    return load_checkpoint(session(tmp_path, name) / "model_latest.pth")["optimizer"]["state"].values()


def test_a_published_checkpoint_continues(options, tmp_path):
    """Epoch, weights and optimizer of the published code: no more, and "module." before each name."""
    train.main(options)
    ours = load_checkpoint(session(tmp_path) / "model_latest.pth")
    published = {"epoch": 3, "optimizer": ours["optimizer"]}
    published["state_dict"] = {f"module.{name}": tensor for name, tensor in ours["state_dict"].items()}
    session(tmp_path, "b").mkdir()
    torch.save(published, session(tmp_path, "b") / "model_latest.pth")
    for name in "ab":
        train.main([*options, "--num_epochs", "5", "--session", name])
    assert_equal_weights(session(tmp_path), session(tmp_path, "b"))


@pytest.mark.parametrize("extra", [["--bf16"], ["--clip_grad", "1e-9"]])
def test_options_change_the_second_epochs_steps(options, tmp_path, extra):
    for name, more in (("a", []), ("b", extra)):
        train.main([*options, *more, "--num_epochs", "2", "--lr", "1e-3", "--session", name])
    first, second = (weights_of(session(tmp_path, name)) for name in "ab")
    changes = [float((first[name] - second[name]).abs().max()) for name in first]
    assert 0 < max(changes) < 1e-2 and all(map(math.isfinite, changes))


def test_held_out_pairs_validate(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "1", "--hold_out", "0.3"])
    assert "4 training and 2 validation pairs" in capsys.readouterr().out
    assert "with --seed" in fails([*options, "--num_epochs", "2", "--hold_out", "0.3", "--seed", "5"])


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(options, tmp_path):
    train.main([*options, "--num_epochs", "1"])
    train.main([*options, "--num_epochs", "1", "--compile", "--session", "b"])
    first, second = (lines_of(session(tmp_path, name))[0]["total"] for name in "ab")
    assert first == pytest.approx(second, rel=1e-5)
    assert weights_of(session(tmp_path, "b")).keys() == weights_of(session(tmp_path)).keys()


def fails(options, capsys=None):
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    code = caught.value.code
    return code if isinstance(code, str) else capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(options, tmp_path, pairs_folder):
    train.main([*options, "--num_epochs", "2"])
    before = (session(tmp_path) / "model_latest.pth").read_bytes()
    message = fails([*options, "--num_epochs", "9", "--lr", "1e30"])
    assert "no longer finite in epoch 3" in message and str(pairs_folder / "input") in message
    assert (session(tmp_path) / "model_latest.pth").read_bytes() == before


def test_a_diverged_network_is_never_saved(options, tmp_path):
    """One step an epoch: the loss is finite until the very step that ruins the weights."""
    message = fails([*options, "--batch_size", "6", "--lr", "1e38"])
    assert "no longer finite" in message
    saved = [load_checkpoint(path)["state_dict"] for path in session(tmp_path).glob("*.pth")]
    assert saved and all(tensor.abs().max() < 100 for weights in saved for tensor in weights.values())
    assert all(math.isfinite(line["val_psnr"]) for line in lines_of(session(tmp_path)))


def test_an_interruption_during_validation_keeps_the_epoch(options, tmp_path, monkeypatch):
    validate = train.Trainer.validate

    def interrupted(trainer):
        if trainer.epoch == 1:
            trainer.interruption.ask(signal.SIGTERM, None)
        return validate(trainer)

    monkeypatch.setattr(train.Trainer, "validate", interrupted)
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    assert caught.value.code == 143
    checkpoint = load_checkpoint(session(tmp_path) / "model_latest.pth")
    assert (checkpoint["epoch"], checkpoint["pictures"]) == (1, 6)
    monkeypatch.undo()
    train.main(options)
    train.main([*options, "--session", "b"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"), ("epoch", "val_psnr", "total"))


def test_a_broken_validation_picture_keeps_the_epoch(options, tmp_path):
    val = make_pairs(tmp_path / "val", count=2)
    (val / "input" / "1.png").write_bytes(b"broken")
    assert "1.png cannot be read" in fails([*options, "--val_dir", str(val)])
    assert load_checkpoint(session(tmp_path) / "model_latest.pth")["pictures"] == 6


def test_training_needs_no_git(options, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train.main([*options, "--num_epochs", "1"])
    assert json.loads((session(tmp_path) / "runs.jsonl").read_text())["commit"] is None


def test_a_full_disk_keeps_the_last_checkpoint(options, tmp_path):
    train.main([*options, "--num_epochs", "2"])
    before = {path: path.read_bytes() for path in session(tmp_path).glob("*.pth")}
    assert len(before) == 3
    limit = min(map(len, before.values())) // 2
    script = f"import resource, train; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); train.main()"
    run = start(options, launcher=("-c", script))
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "model_latest.pth cannot be written" in output or "model_best.pth cannot be written" in output
    assert "free some space" in output and "Traceback" not in output
    assert {path: path.read_bytes() for path in session(tmp_path).glob("*.pth")} == before
    assert not list(session(tmp_path).glob(".*"))


def test_a_broken_picture_is_named(options, pairs_folder):
    (pairs_folder / "target" / "2.png").write_bytes(b"broken")
    for workers in ("0", "1"):
        message = fails([*options, "--num_workers", workers])
        assert message.startswith(f"error: {pairs_folder / 'target' / '2.png'} cannot be read as a picture")


def test_a_missing_data_set_says_what_to_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails(["--dataset", "DDN-Data"])
    for part in ("12600", "1400", "1g_m7RfSUJUtknlWugO1nrw", "ldzo", "Datasets/DDN-Data/train/input", "train.sh demo"):
        assert part in message


def test_train_sh_takes_the_name_of_the_data_set(tmp_path):
    if (ROOT / "Datasets" / "Rain200L").exists():
        pytest.skip("Rain200L is here: it would be trained on")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    for name, code, message in (([], 1, "Datasets/Rain200L/train does not exist"), (["x"], 2, "Rain200H")):
        command = ["bash", ROOT / "train.sh", *name]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == code and message in run.stderr


def test_presets_are_the_authors_and_can_be_overridden():
    args = train.parse_args(["--dataset", "DID-Data", "--batch_size", "3"])
    assert (args.num_epochs, args.patch_size, args.batch_size, args.lr) == (200, 256, 3, 1e-4)
    assert (args.train_dir, args.val_dir) == ("Datasets/DID-Data/train", "Datasets/DID-Data/test")
    epochs = {name: recipe.num_epochs for name, recipe in DATASETS.items() if recipe.num_epochs and name != "demo"}
    assert epochs == {
        "Rain200L": 600,
        "Rain200H": 600,
        "DID-Data": 200,
        "DDN-Data": 200,
        "SPA-Data": 10,
    }
    plain = train.parse_args([])
    assert (plain.num_epochs, plain.patch_size, plain.batch_size, plain.mode) == (3000, 256, 1, "Deraininig")


def test_the_demo_set_is_complete():
    for split in ("train", "test"):
        pairs = find_pairs(ROOT / "Datasets" / "demo" / split)
        assert len(pairs) == {"train": DATASETS["demo"].train_pairs, "test": DATASETS["demo"].test_pairs}[split]
    assert sum(path.stat().st_size for path in (ROOT / "Datasets" / "demo").rglob("*.*")) < 6e6


def test_a_folder_that_cannot_be_made_is_named(options, tmp_path):
    (tmp_path / "file").touch()
    assert "file/Deraininig" in fails([*options, "--model_save_dir", str(tmp_path / "file")])


@pytest.mark.parametrize(
    "change, expected",
    [
        (["--patch_size", "40"], "multiple of 16"),
        (["--batch_size", "0"], "at least 1"),
        (["--hold_out", "1.5"], "between 0 and 1"),
        (["--ema", "1"], "between 0 and 1"),
        (["--lr", "0"], "above 0"),
        (["--clip_grad", "-1"], "above 0"),
        (["--seed", "-1"], "at least 0"),
        (["--dim", "9"], "multiple of 2"),
        (["--num_blocks", "1", "0", "1"], "at least 1"),
        (["--passes", "1", "0", "3"], "at least 1"),
        (["--train_dir", "nowhere"], "nowhere/input does not exist"),
        (["--dataset", "demo", "--train_dir", "nowhere"], "nowhere/input does not exist"),
        (["--pretrain_weights", "none.pth"], "none.pth does not exist"),
        (["--model", "nerd_rain"], "narrow.pth holds a network of width 8"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(options, change, expected, capsys, tmp_path):
    assert expected in fails([*options, *change], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_mismatch_is_refused_before_training(options, tmp_path, pairs_folder):
    make_pairs(pairs_folder, count=7)
    (pairs_folder / "target" / "6.png").unlink()
    assert "input/6.png has no clean picture" in fails(options)
    assert not (tmp_path / "runs").exists()


def test_bare_weights_in_place_of_a_checkpoint_are_refused(options, tmp_path, narrow_weights):
    session(tmp_path).mkdir(parents=True)
    torch.save(load_checkpoint(narrow_weights)["state_dict"], session(tmp_path) / "model_latest.pth")
    assert "holds weights only" in fails(options)


def test_a_truncated_latest_checkpoint_is_named(options, tmp_path):
    session(tmp_path).mkdir(parents=True)
    (session(tmp_path) / "model_latest.pth").write_bytes(b"PK\x03\x04")
    assert "model_latest.pth cannot be read as a checkpoint" in fails(options)


def test_photographs_are_trained_on_with_synthetic_rain(options, pairs_folder, tmp_path):
    photos = pairs_folder / "target"
    args = train.parse_args([*options, "--clean_dir", str(photos), "--clean_repeats", "3"])
    pairs, validation = train.find_data(args)
    alone = train.parse_args(["--clean_dir", str(photos), "--val_dir", args.val_dir])
    photographs, same = train.find_data(alone)
    assert len(pairs) == len(find_pairs(args.train_dir)) + 3 * len(photographs) and validation == same
    patches = TrainingPatches(photographs, 32, seed=1)
    first, again, next_epoch = patches[0], patches[0], patches[len(patches)]
    assert torch.equal(first["input"], again["input"])
    assert not torch.equal(first["input"], first["target"]) and not torch.equal(first["input"], next_epoch["input"])
    train.main([*options, "--clean_dir", str(photos), "--num_epochs", "1"])
    assert lines_of(session(tmp_path))[0]["total"] > 0


def test_training_starts_from_averaged_weights(options, tmp_path, narrow_weights):
    averaged = {name: tensor + 1 for name, tensor in load_checkpoint(narrow_weights)["state_dict"].items()}
    save_checkpoint(tmp_path / "both.pth", state_dict=load_checkpoint(narrow_weights)["state_dict"], ema=averaged)
    args = train.parse_args([*options, "--pretrain_weights", str(tmp_path / "both.pth")])
    net = train.make_network(args, tmp_path / "latest.pth", None)
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in net.state_dict().items())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_named(options, tmp_path):
    session(tmp_path).mkdir(parents=True)
    (session(tmp_path) / "runs.jsonl").symlink_to("/dev/full")
    assert fails(
        options
    ) == f"error: {session(tmp_path) / 'runs.jsonl'} cannot be written (No space left on device): " + (
        "free some space."
    )
