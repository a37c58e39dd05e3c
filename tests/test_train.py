import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ablations
import train
from tests.conftest import make_pairs
from tests.golden import NUMBERS
from utils import devices
from utils.checkpoint import load_checkpoint, load_network
from utils.pairs import DATASETS
from utils.pictures import write_png

ROOT = Path(__file__).parent.parent


def arguments(pairs, weights, folder):
    """Arguments of a run on small pairs with a narrow network, below `folder`; six pairs make three steps an epoch."""
    val = make_pairs(folder / "val", count=2, seed=1)
    start = ["--pretrain_weights", str(weights)] if weights else []
    return [
        *("--train_dir", str(pairs), "--val_dir", str(val), "--model_save_dir", str(folder / "runs"), *start),
        *("--session", "a", "--patch_size", "32", "--batch_size", "2", "--num_epochs", "2", "--num_workers", "0"),
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


def fails(options):
    """-> the message that a run ends with."""
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    return caught.value.code


def latest(folder):
    return load_checkpoint(folder / "model_latest.pth")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(folder, other, keys=("epoch", "lr", "total")):
    """Two sessions end with the same weights, averages and moments, bit by bit, and logged the same losses."""
    first, second = latest(folder), latest(other)
    for part in {"state_dict", "ema"} & first.keys():
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    for number, state in first["optimizer"]["state"].items():
        assert all(torch.equal(tensor, second["optimizer"]["state"][number][name]) for name, tensor in state.items())
    assert torch.equal(first["random_state"], second["random_state"])
    for line, same in zip(lines_of(folder), lines_of(other), strict=True):
        assert [line.get(key) for key in keys] == pytest.approx([same.get(key) for key in keys], rel=1e-9)


def assert_equal_gradients(folder, other, keys=("total",)):
    """Two sessions took the same steps: Adam's moments, sums over the gradients of all of them and over their squares,
    and the logged losses differ by rounding alone.

    Adam makes a full step of a gradient near zero, whose sign is rounding. For this comparison runs are given a rate
    at which weights stay where they are."""
    first, second = (latest(path)["optimizer"]["state"] for path in (folder, other))
    for number, state in first.items():
        for name in ("exp_avg", "exp_avg_sq"):
            bound = 1e-3 * state[name].abs().max().item()
            torch.testing.assert_close(second[number][name], state[name], rtol=1e-3, atol=bound)
    for line, same in zip(lines_of(folder), lines_of(other), strict=True):
        assert [line[key] for key in keys] == pytest.approx([same[key] for key in keys], rel=1e-5)


def test_a_run_leaves_checkpoints_logs_and_a_record(options, tmp_path, narrow_weights, capsys):
    train.main([*options, "--ema", "0.9", "--num_epochs", "3", "--save_epochs", "2"])
    folder = session(tmp_path)
    best, lines = load_checkpoint(folder / "model_best.pth"), lines_of(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx([0, 1e-4 / 3, 2e-4 / 3])
    assert best["best_psnr"] == max(line["val_psnr"] for line in lines)
    assert best["epoch"] == next(line["epoch"] for line in lines if line["val_psnr"] == best["best_psnr"])
    assert f"best {best['best_psnr']:.2f} dB in epoch {best['epoch']}" in capsys.readouterr().out.splitlines()[-2]
    for line in lines:
        weighted = line["charbonnier"] + 0.01 * line["fft"] + 0.05 * line["edge"] + 0.1 * line["l1"]
        assert line["total"] == pytest.approx(weighted, rel=1e-5)
    run = json.loads((folder / "runs.jsonl").read_text())
    assert run["arguments"]["patch_size"] == 32 and run["torch"] == torch.__version__
    assert {"commit", "device", "time", "command"} <= run.keys()
    initial, trained = load_checkpoint(narrow_weights)["state_dict"], latest(folder)["state_dict"]
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, initial[name])}
    assert moved == initial.keys() - {"reduce_chan_level1_max3.weight"}
    board = EventAccumulator(str(folder)).Reload().Tags()
    terms = {"charbonnier", "fft", "edge", "l1", "total"}
    expected = {f"epoch/{name}" for name in {*terms, "lr", "val_psnr", "pictures_per_second"}}
    assert expected | {f"loss/{name}" for name in terms} <= set(board["scalars"])
    assert board["images"] == ["rainy, derained, clean"]
    assert [load_checkpoint(path)["epoch"] for path in folder.glob("model_epoch_*.pth")] == [2]
    net = load_network(folder / "model_best.pth")
    assert net.options["dim"] == 8 and torch.equal(net.INR.imnet.layers[0].bias, best["ema"]["INR.imnet.layers.0.bias"])


def test_training_lowers_the_loss(options, tmp_path):
    train.main([*options, "--num_epochs", "6", "--lr", "2e-3", "--no_zero_epoch", "--val_epochs", "4"])
    lines = lines_of(session(tmp_path))
    assert lines[-1]["total"] < 0.9 * lines[0]["total"]
    assert [line["lr"] for line in lines] == train.learning_rates(6, 2e-3, no_zero_epoch=True)
    assert [line["epoch"] for line in lines if "val_psnr" in line] == [4, 6]


def test_saving_memory_changes_no_weight(options, tmp_path):
    options += ["--ema", "0.9", "--no_zero_epoch", "--num_epochs", "1"]
    train.main(options)
    train.main([*options, "--session", "b", "--save_memory"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"))


def test_accumulated_batches_take_the_steps_of_larger_ones(options, tmp_path):
    options += ["--lr", "1e-12"]
    train.main([*options, "--num_epochs", "1", "--batch_size", "4"])  # its second batch has two pictures
    train.main([*options, "--num_epochs", "1", "--batch_size", "1", "--accumulate", "4", "--session", "b"])
    assert_equal_gradients(session(tmp_path), session(tmp_path, "b"), ())
    assert {state["step"].item() for state in latest(session(tmp_path, "b"))["optimizer"]["state"].values()} == {2}


def test_a_published_checkpoint_continues(options, tmp_path):
    """Epoch, weights and optimizer, no more; "module." before each name, contiguous moments and no fused Adam."""
    train.main(options)
    ours = latest(session(tmp_path))
    for state in ours["optimizer"]["state"].values():
        state.update((name, tensor.contiguous()) for name, tensor in state.items())
    for group in ours["optimizer"]["param_groups"]:
        group.pop("fused")
    published = {"epoch": ours["epoch"], "optimizer": ours["optimizer"]}
    published["state_dict"] = {f"module.{name}": tensor for name, tensor in ours["state_dict"].items()}
    session(tmp_path, "b").mkdir()
    torch.save(published, session(tmp_path, "b") / "model_latest.pth")
    for name in "ab":
        train.main([*options, "--num_epochs", "3", "--session", name])
    first, second = (latest(session(tmp_path, name)) for name in "ab")
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert second["optimizer"]["param_groups"][0]["fused"]


def test_options_change_the_steps(options, tmp_path):
    options += ["--batch_size", "6", "--lr", "1e-3", "--num_epochs", "1"]
    plain = ["--no_zero_epoch"]
    variants = {"a": plain, "bf16": [*plain, "--bf16"], "clipped": [*plain, "--clip_grad", "1e-9"], "zero": []}
    for name, more in variants.items():
        train.main([*options, *more, "--session", name])
    plain, *others = (latest(session(tmp_path, name))["state_dict"] for name in variants)
    for other in others:
        changes = [float((plain[name] - other[name]).abs().max()) for name in plain]
        assert 0 < max(changes) < 1e-2 and all(map(math.isfinite, changes))


@pytest.mark.parametrize("epochs", [20, 300, 3000])
def test_learning_rates_are_the_published_ones(epochs):
    expected = NUMBERS["lr_schedule"][str(epochs)]
    if isinstance(expected, list):
        expected = dict(enumerate(expected, start=1))
    rates = train.learning_rates(epochs, 1e-4)
    for epoch, rate in expected.items():
        assert rates[int(epoch) - 1] == pytest.approx(rate, rel=1e-12, abs=0), epoch


@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_runs_no_longer_than_the_warm_up_have_rates(epochs):
    assert train.learning_rates(epochs, 1e-4) == pytest.approx([0, 1e-4 / 3, 2e-4 / 3, 1e-4][:epochs])


@pytest.mark.parametrize("name", [*ablations.ABLATIONS, "mprnet", "no_zero_epoch"])
def test_every_ablation_has_its_network_session_and_settings(name):
    args = train.parse_args(["--ablation", name, "--dim", "8", "--num_blocks", "1", "1", "1", "--seed", "3"])
    with torch.device("meta"):
        net = train.make_network(args, None, {})
    changed = ablations.ABLATIONS.get(name, {})
    assert args.session == f"ablation/{name}/3" and args.no_zero_epoch == (name == "no_zero_epoch")
    assert {key: net.options[key] for key in changed} == changed
    assert (net.options["heads"] is None) == (name == "mprnet") and net.options["dim"] == 8


def test_presets_are_the_authors_and_can_be_overridden():
    args = train.parse_args(["--dataset", "DID-Data", "--batch_size", "3"])
    assert (args.num_epochs, args.patch_size, args.batch_size, args.lr) == (200, 256, 3, 1e-4)
    assert (args.train_dir, args.val_dir) == ("Datasets/DID-Data/train", "Datasets/DID-Data/test")
    demo = train.parse_args(["--dataset", "demo"])
    assert (demo.session, demo.num_epochs, demo.ema) == ("demo", DATASETS["demo"].num_epochs, DATASETS["demo"].ema)
    assert ablations.network_name(train.make_network(demo, None, {})) == DATASETS["demo"].model
    plain = train.parse_args([])
    assert (plain.num_epochs, plain.patch_size, plain.batch_size, plain.mode) == (3000, 256, 1, "Deraininig")
    assert (plain.train_dir, plain.session) == ("Datasets/Rain200L/train", "Multiscale")
    photos = train.parse_args(["--clean_dir", "photos", "--val_dir", "val"])
    assert photos.train_dir is None


@pytest.mark.parametrize(
    "change, expected",
    [
        (["--patch_size", "40"], "must be a multiple of 16"),
        (["--batch_size", "0"], "must be at least 1"),
        (["--batch_size", "two"], "invalid int value"),
        (["--hold_out", "1.5"], "must be between 0 and 1"),
        (["--ema", "1"], "must be between 0 and 1"),
        (["--lr", "0"], "must be above 0"),
        (["--clip_grad", "nan"], "must be above 0"),
        (["--seed", "-1"], "must be at least 0"),
        (["--dim", "9"], "must be a multiple of 2"),
        (["--num_blocks", "1", "0", "1"], "must be at least 1"),
        (["--val_dir", ""], "give --val_dir DIR to validate on, or --hold_out 0.05"),
        (["--train_dir", "nowhere"], "nowhere/input does not exist"),
        (["--val_dir", "nowhere"], "nowhere/input does not exist"),
        (["--clean_dir", "nowhere"], "nowhere"),
        (["--model_save_dir", __file__], "test_train.py/Deraininig"),
        (["--pretrain_weights", "none.pth"], "none.pth does not exist"),
        (["--model", "NeRD-Rain"], "narrow.pth holds a network of width 8, blocks (1, 1, 1), but NeRD-Rain was asked"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(options, change, expected, capsys, tmp_path):
    code = fails([*options, *change])
    assert expected in (code if isinstance(code, str) else capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_errors_of_validation_data_appear_before_the_first_epoch(options, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / "val" / "input" / name).write_bytes(b"broken")
    assert "val/input/0.png cannot be read" in fails(options)
    assert not (tmp_path / "runs").exists()
    write_png(tmp_path / "val" / "input" / "0.png", torch.zeros(40, 48, 3).byte().numpy())
    assert "val/input/1.png cannot be read" in fails(options)  # a later one, which does not cost the epoch
    assert latest(session(tmp_path))["pictures"] == 6


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_named(options, pairs_folder, workers):
    (pairs_folder / "target" / "2.png").write_bytes(b"broken")
    message = fails([*options, "--num_workers", workers])
    assert message.startswith(f"error: {pairs_folder / 'target' / '2.png'} cannot be read as a picture")


def test_held_out_pairs_validate(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "1", "--hold_out", "0.3"])
    assert "4 training pairs, 2 validation pairs" in capsys.readouterr().out
    assert "was trained on other pictures" in fails([*options, "--hold_out", "0.3", "--seed", "5"])


def test_photographs_are_trained_on_with_synthetic_rain(options, tmp_path, pairs_folder, capsys):
    photos = ["--clean_dir", str(pairs_folder / "target"), "--clean_repeats", "2"]
    train.main([*options, *photos, "--batch_size", "6", "--num_epochs", "1"])
    assert "18 training pairs" in capsys.readouterr().out
    assert lines_of(session(tmp_path))[0]["total"] > 0


@pytest.mark.parametrize("look_steps", [1, 2])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoint(options, tmp_path, monkeypatch, look_steps):
    train.main(options)
    before = (session(tmp_path) / "model_latest.pth").read_bytes()
    steps, train_step = [], train.Trainer.train_step

    def poisoned(trainer, batch):
        trainer.look_steps = look_steps
        steps.append((trainer.step + 1, batch["name"]))
        if trainer.step == 0:
            batch["target"] = batch["target"] + math.nan
        return train_step(trainer, batch)

    monkeypatch.setattr(train.Trainer, "train_step", poisoned)
    message = fails([*options, "--num_epochs", "9"])
    assert "no longer finite in epoch 3, step 1" in message and len(steps) == look_steps
    assert all(name in message for name in steps[0][1]) and (look_steps == 1 or steps[1][1][0] not in message)
    assert (session(tmp_path) / "model_latest.pth").read_bytes() == before


def test_a_gradient_that_is_not_finite_is_never_saved(options, tmp_path, monkeypatch):
    """The loss is finite, and the run would save before it looks."""
    monkeypatch.setattr(train, "SAVE_STEPS", 1)
    losses = train.Trainer.losses

    def steep(trainer, rainy, clean):
        trainer.look_steps = 50
        found = losses(trainer, rainy, clean)
        if trainer.step == 2:
            found["total"] = found["total"] + 0 * (found["total"] - found["total"].detach()).sqrt()
        return found

    monkeypatch.setattr(train.Trainer, "losses", steep)
    message = fails(options)
    assert "no longer finite in epoch 1, step 2" in message and message.count(".png") == 2
    saved = latest(session(tmp_path))
    assert saved["pictures"] == 2 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_a_diverged_network_is_never_saved(options, tmp_path):
    """One step an epoch: the loss is finite until the very step that ruins the weights."""
    assert "no longer finite" in fails([*options, "--batch_size", "6", "--lr", "1e38"])
    saved = [load_checkpoint(path)["state_dict"] for path in session(tmp_path).glob("*.pth")]
    assert saved and all(tensor.abs().max() < 100 for weights in saved for tensor in weights.values())
    assert all(math.isfinite(line["val_psnr"]) for line in lines_of(session(tmp_path)))


def test_a_full_disk_keeps_the_last_checkpoint(options, tmp_path):
    """It is full when the run resumes, or when TensorBoard and checkpoints are written."""
    train.main(options)
    before = {path: path.read_bytes() for path in session(tmp_path).glob("*.pth")}
    assert len(before) == 3
    for limit in (0, 4000):
        script = f"import resource, train; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); train.main()"
        run = start([*options, "--num_epochs", "3"], launcher=("-c", script))
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 1 and "Traceback" not in output
        error = output[output.index("error: ") :]
        assert error.count("\n") == 1 and str(tmp_path / "runs") in error and "free some space" in error
        assert {path: path.read_bytes() for path in session(tmp_path).glob("*.pth")} == before
    assert not list(session(tmp_path).glob(".*"))


def test_bare_weights_in_place_of_a_checkpoint_are_refused(options, tmp_path, narrow_weights):
    session(tmp_path).mkdir(parents=True)
    torch.save(load_checkpoint(narrow_weights)["state_dict"], session(tmp_path) / "model_latest.pth")
    assert "holds weights only" in fails(options)


def test_progress_is_printed_off_a_terminal(options, monkeypatch, capsys):
    monkeypatch.setattr(train, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(devices, "cpu_warnings", lambda gpus: ["note: the machine is busy"])
    train.main([*options, "--num_epochs", "1"])
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("epoch 1/1, ")]
    assert len(lines) == 3 and output.count("note: the machine is busy\n") == 1
    assert re.fullmatch(r"epoch 1/1, step 2/3: [0-9.]+ pictures/s, run [0-9:]+ left, loss [0-9.]+", lines[1])


def test_where_compiling_fails_training_goes_on(options, tmp_path, monkeypatch, capsys):
    def broken(net, **settings):
        def compiled(x):
            raise RuntimeError("no compiler was found\nmore about it")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    options += ["--no_zero_epoch", "--num_epochs", "1"]
    train.main([*options, "--compile"])
    assert "--compile does not work here (no compiler was found)" in capsys.readouterr().out
    train.main([*options, "--session", "b"])
    assert_equal_runs(session(tmp_path), session(tmp_path, "b"))


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "1"])
    train.main([*options, "--num_epochs", "1", "--compile", "--session", "b"])
    assert "--compile does not work here" not in capsys.readouterr().out
    first, second = (lines_of(session(tmp_path, name))[0]["total"] for name in "ab")
    assert first == pytest.approx(second, rel=1e-5)
    assert latest(session(tmp_path, "b"))["state_dict"].keys() == latest(session(tmp_path))["state_dict"].keys()


@pytest.mark.parametrize("name, code, expected", [(["DDN-Data"], 1, "1g_m7RfSUJ"), (["ablation", "x"], 2, "inr_none")])
def test_train_sh_takes_the_name_of_the_data_set(name, code, expected):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    run = subprocess.run(["bash", ROOT / "train.sh", *name], env=environment, capture_output=True, text=True)
    assert run.returncode == code and expected in run.stderr
