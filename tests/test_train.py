import json
import math
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ablations
import train
from dataset_RGB import EpochSampler, ValidationPatches
from evaluations.metrics import psnr
from tests.conftest import NARROW, NARROW_OPTIONS, ROOT, failure, make_pairs
from tests.golden import NUMBERS
from utils import devices
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.pairs import DATASETS, find_pairs


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


def start(options, launcher):
    command = [sys.executable, *launcher, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def run_to_end(options, launcher):
    """-> exit code, output."""
    run = start(options, launcher)
    output, _ = run.communicate(timeout=600)
    return run.returncode, output


def fails(options):
    return failure(train.main, options)


def latest(folder):
    return load_checkpoint(folder / "model_latest.pth")


def lines_of(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_equal_runs(tmp_path, keys=("epoch", "lr", "total")):
    """Sessions a and b end with the same weights, averages and moments, bit by bit, and logged the same losses."""
    first, second = (latest(session(tmp_path, name)) for name in "ab")
    for part in ("state_dict", "random_state", *{"ema"} & first.keys()):
        torch.testing.assert_close(second[part], first[part], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer"]["state"], first["optimizer"]["state"], rtol=0, atol=0)
    for line, same in zip(*(lines_of(session(tmp_path, name)) for name in "ab"), strict=True):
        assert [line.get(key) for key in keys] == pytest.approx([same.get(key) for key in keys], rel=1e-9)


def assert_equal_gradients(tmp_path, keys=("total",)):
    """Sessions a and b took the same steps: Adam's moments, sums over the gradients of all steps and over their
    squares, and the logged losses differ by rounding alone.

    Adam makes a full step of a gradient near zero, whose sign is rounding. For this comparison runs are given a rate
    at which weights stay where they are."""
    first, second = (latest(session(tmp_path, name))["optimizer"]["state"] for name in "ab")
    for number, state in first.items():
        for name in ("exp_avg", "exp_avg_sq"):
            bound = 1e-3 * state[name].abs().max().item()
            torch.testing.assert_close(second[number][name], state[name], rtol=1e-3, atol=bound)
    for line, same in zip(*(lines_of(session(tmp_path, name)) for name in "ab"), strict=True):
        assert [line[key] for key in keys] == pytest.approx([same[key] for key in keys], rel=1e-5)


def test_a_run_lowers_the_loss_and_leaves_checkpoints_logs_and_a_record(options, tmp_path, narrow_weights, capsys):
    options += ["--num_epochs", "6", "--no_zero_epoch", "--lr", "2e-3", "--ema", "0.9"]
    train.main([*options, "--val_epochs", "4", "--save_epochs", "4"])
    folder = session(tmp_path)
    best, lines = load_checkpoint(folder / "model_best.pth"), lines_of(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == train.learning_rates(6, 2e-3, no_zero_epoch=True)
    assert lines[-1]["total"] < 0.9 * lines[0]["total"]
    validated = {line["epoch"]: line["val_psnr"] for line in lines if "val_psnr" in line}
    assert list(validated) == [4, 6] and validated[best["epoch"]] == best["best_psnr"] == max(validated.values())
    _, first, *_, last, _ = capsys.readouterr().out.splitlines()
    assert "best" not in first and f"best {best['best_psnr']:.2f} dB in epoch {best['epoch']}" in last
    for line in lines:
        weighted = line["charbonnier"] + 0.01 * line["fft"] + 0.05 * line["edge"] + 0.1 * line["l1"]
        assert line["total"] == pytest.approx(weighted, rel=1e-5)
    (run,) = lines_of(folder, "runs.jsonl")
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
    assert [load_checkpoint(path)["epoch"] for path in folder.glob("model_epoch_*.pth")] == [4]


def test_accumulated_batches_take_the_steps_of_larger_ones(options, tmp_path):
    options += ["--lr", "1e-12"]
    train.main([*options, "--num_epochs", "1", "--batch_size", "4"])  # its second batch has two pictures
    train.main([*options, "--num_epochs", "1", "--batch_size", "1", "--accumulate", "4", "--session", "b"])
    assert_equal_gradients(tmp_path, keys=())
    assert {state["step"].item() for state in latest(session(tmp_path, "b"))["optimizer"]["state"].values()} == {2}


def test_a_published_checkpoint_continues_and_bare_weights_do_not(options, tmp_path):
    """Epoch, weights and optimizer, no more; "module." before each name, contiguous moments and no fused Adam."""
    train.main(options)
    ours = latest(session(tmp_path))
    for state in ours["optimizer"]["state"].values():
        state.update((name, tensor.contiguous()) for name, tensor in state.items())
    for group in ours["optimizer"]["param_groups"]:
        group.pop("fused")
    weights = {f"module.{name}": tensor for name, tensor in ours["state_dict"].items()}
    published = {"epoch": ours["epoch"], "optimizer": ours["optimizer"], "state_dict": weights}
    save_checkpoint(session(tmp_path, "b") / "model_latest.pth", **published)
    for name in "ab":
        train.main([*options, "--num_epochs", "3", "--session", name])
    first, second = (latest(session(tmp_path, name)) for name in "ab")
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert second["optimizer"]["param_groups"][0]["fused"]
    save_checkpoint(session(tmp_path, "c") / "model_latest.pth", state_dict=weights)
    assert "holds weights only" in fails([*options, "--session", "c"])


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


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 20, 300, 3000])  # the warm-up has 4
def test_learning_rates_are_the_published_ones(epochs):
    published, rates = NUMBERS["lr_schedule"], train.learning_rates(epochs, 1e-4)
    expected = published.get(str(epochs), published["20"][:epochs])
    if isinstance(expected, dict):
        rates = {epoch: rates[int(epoch) - 1] for epoch in expected}
    assert rates == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", [*ablations.ABLATIONS, "mprnet", "no_zero_epoch"])
def test_every_ablation_has_its_network_session_and_settings(name):
    args = train.parse_args(["--ablation", name, *NARROW_OPTIONS, "--seed", "3"])
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
    assert train.parse_args(["--clean_dir", "photos", "--val_dir", "val"]).train_dir is None


@pytest.mark.parametrize(
    "change, expected",
    [
        (["--patch_size", "40"], "must be a multiple of 16"),
        (["--batch_size", "0"], "must be at least 1"),
        (["--batch_size", "two"], "invalid int value"),
        (["--ema", "1"], "must be between 0 and 1"),
        (["--clip_grad", "nan"], "must be above 0"),
        (["--seed", "-1"], "must be at least 0"),
        (["--dim", "9"], "must be a multiple of 2"),
        (["--val_dir", ""], "give --val_dir DIR, pairs to validate on, or --hold_out 0.05 to validate on a part"),
        (["--val_dir", "", "--train_dir", "", "--clean_dir", "photos"], "give --val_dir DIR, pairs to validate on\n"),
        (["--ablation", "mprnet", "--model", "NeRD-Rain-S"], "is a network of its own: omit --model"),
        (["--train_dir", "nowhere"], "nowhere/input does not exist"),
        (["--val_dir", "nowhere"], "nowhere/input does not exist"),
        (["--clean_dir", "nowhere"], "nowhere"),
        (["--model_save_dir", __file__], "test_train.py/Deraininig"),
        (["--model", "NeRD-Rain"], "narrow.pth holds a network of width 8, blocks (1, 1, 1), but NeRD-Rain was asked"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(options, change, expected, capsys, tmp_path):
    assert expected in fails([*options, *change]) + capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def test_broken_pictures_are_named_before_the_first_epoch(options, tmp_path, pairs_folder, monkeypatch):
    validation, training = tmp_path / "val/input/1.png", pairs_folder / "target/2.png"
    whole = validation.read_bytes()
    for path in (validation, training):
        path.write_bytes(b"broken")
    assert f"{validation} cannot be read" in fails(options)
    assert not list(tmp_path.rglob("*.jsonl"))
    validation.write_bytes(whole)
    assert fails([*options, "--num_workers", "1"]).startswith(f"error: {training} cannot be read as a picture")
    training.write_bytes(whole)
    monkeypatch.setattr(train.Trainer, "validate", Mock(side_effect=train.UserError("a picture broke later.")))
    assert "a picture broke later" in fails(options)
    assert latest(session(tmp_path))["pictures"] == 6  # the epoch is kept


@pytest.mark.parametrize("check_steps", [1, 50])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_never_saved(options, tmp_path, monkeypatch, poison, check_steps):
    """A loss or, though the loss is finite, a gradient; the run would save after the next step, before it checks."""
    monkeypatch.setattr(train, "SAVE_STEPS", 2)
    losses = train.Trainer.compute_losses

    def poisoned(trainer, rainy, clean):
        trainer.check_steps = check_steps
        found = losses(trainer, rainy, clean)
        if (trainer.epoch, trainer.step) == (1, 1):
            total = found["total"]
            found["total"] = total * math.nan if poison == "loss" else total + 0 * (total - total.detach()).sqrt()
        return found

    monkeypatch.setattr(train.Trainer, "compute_losses", poisoned)
    message = fails(options)
    sampler = EpochSampler(6, batch_size=2, seed=1234)
    sampler.epoch = 1
    first, second = (f"{index % 6}.png" for index in next(iter(sampler)))
    assert "no longer finite in epoch 2, step 1" in message
    assert first in message and second in message and message.count(".png") == 2
    saved = latest(session(tmp_path))
    assert saved["epoch"] == 1 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_a_diverged_network_is_never_saved(options, tmp_path):
    """One step an epoch: the loss is finite until the very step that ruins the weights."""
    assert fails([*options, "--batch_size", "6", "--lr", "1e38"]).endswith("or a lower --lr.")
    saved = [load_checkpoint(path)["state_dict"] for path in session(tmp_path).glob("*.pth")]
    assert saved and all(tensor.abs().max() < 100 for weights in saved for tensor in weights.values())
    assert all(math.isfinite(line["val_psnr"]) for line in lines_of(session(tmp_path)))


def test_a_full_disk_keeps_the_last_checkpoint(options, tmp_path):
    """It is full when the run resumes, or when TensorBoard and checkpoints are written."""
    train.main(options)
    before = {path: path.read_bytes() for path in session(tmp_path).glob("*.pth")}
    for limit in (0, 4000):
        script = f"import resource, train; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); train.main()"
        code, output = run_to_end([*options, "--num_epochs", "3"], launcher=("-c", script))
        assert code == 1 and "Traceback" not in output
        error = output[output.index("error: ") :]
        assert error.count("\n") == 1 and str(tmp_path / "runs") in error and "free some space" in error
        assert {path: path.read_bytes() for path in session(tmp_path).glob("*.pth")} == before
    assert not list(session(tmp_path).glob(".*"))


def test_a_run_prints_its_data_and_off_a_terminal_its_progress(options, pairs_folder, monkeypatch, capsys):
    """Photographs are trained on, held-out pairs validate."""
    monkeypatch.setattr(train, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(devices, "cpu_warnings", lambda gpus: ["note: the machine is busy"])
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    options += ["--clean_dir", str(pairs_folder / "target"), "--clean_repeats", "2", "--hold_out", "0.3"]
    train.main([*options, "--batch_size", "6", "--num_epochs", "1", "--bf16"])
    output = capsys.readouterr().out
    assert f"{4 + 2 * 6} training pairs, 2 validation pairs" in output and "omit --bf16" in output
    lines = [line for line in output.splitlines() if line.startswith("epoch 1/1, ")]
    assert len(lines) == 3 and output.count("note: the machine is busy\n") == 1
    progress = r"epoch 1/1, step 2/3, lr 0: epoch [0-9:]+ left, \S+ pictures/s, run [0-9:]+ left, loss [0-9.]+"
    assert re.fullmatch(progress, lines[1])


def test_averages_follow_by_their_decay_and_are_validated(options, tmp_path, narrow_weights):
    options += ["--batch_size", "6", "--num_epochs", "1", "--no_zero_epoch", "--lr", "1e-2", "--ema", "0.9"]
    train.main(options)
    initial, saved = load_checkpoint(narrow_weights)["state_dict"], latest(session(tmp_path))
    for name, average in saved["ema"].items():
        expected = 0.9 * initial[name] + 0.1 * saved["state_dict"][name]
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)
    net, best = load_network(session(tmp_path) / "model_best.pth").eval(), []
    for patch in ValidationPatches(find_pairs(tmp_path / "val"), 32):
        result = net(patch["input"][None] / 255)[0].clamp(0, 1)
        best.append(psnr((result - patch["target"] / 255).square().mean().item(), peak=1))
    assert saved["best_psnr"] == pytest.approx(sum(best) / 2, abs=1e-3)
    args = train.parse_args([*options, "--pretrain_weights", str(session(tmp_path) / "model_best.pth")])
    start = train.make_network(args, None, {}).state_dict()
    assert all(torch.equal(tensor, saved["ema"][name]) for name, tensor in start.items())


def test_the_seed_sets_the_initial_weights(pairs_folder, tmp_path):
    options = [*arguments(pairs_folder, None, tmp_path), *NARROW_OPTIONS, "--seed", "5"]
    net = train.Trainer(train.parse_args(options)).net
    torch.manual_seed(5)
    torch.testing.assert_close(net.state_dict(), ablations.build(**NARROW).state_dict(), rtol=0, atol=0)


def test_saving_memory_and_a_compiler_that_fails_change_no_weight(options, tmp_path, monkeypatch, capsys):
    def fail(x):
        raise RuntimeError("no compiler was found\nmore about it")

    monkeypatch.setattr(torch, "compile", lambda net, **settings: fail)
    options += ["--no_zero_epoch", "--num_epochs", "1", "--ema", "0.9"]
    train.main(options)
    monkeypatch.setattr(ablations, "checkpoint_activations", spy := Mock(wraps=ablations.checkpoint_activations))
    train.main([*options, "--session", "b", "--compile", "--save_memory"])
    assert "--compile does not work here (no compiler was found)" in capsys.readouterr().out and spy.call_count == 1
    assert_equal_runs(tmp_path)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(options, tmp_path, capsys):
    train.main([*options, "--num_epochs", "1"])
    train.main([*options, "--num_epochs", "1", "--compile", "--session", "b"])
    assert "--compile does not work here" not in capsys.readouterr().out
    first, second = (lines_of(session(tmp_path, name))[0]["total"] for name in "ab")
    assert first == pytest.approx(second, rel=1e-5)
    assert latest(session(tmp_path, "b"))["state_dict"].keys() == latest(session(tmp_path))["state_dict"].keys()


def test_train_sh_takes_the_name_of_the_data_set(monkeypatch):
    shown = 'exec() { echo "$@"; exit; }; source "$0" "$@"'  # what it would run
    for gpus, given, expected in (
        ("1", "--lr 1", "python train.py --dataset Rain200L --lr 1"),
        ("1", "ablation inr_none", "python train.py --dataset Rain200L --ablation inr_none"),
        ("2", "demo", "torchrun --standalone --nproc_per_node 2 train.py --dataset demo"),
    ):
        monkeypatch.setenv("GPUS", gpus)
        command = ["bash", "-c", shown, ROOT / "train.sh", *given.split()]
        assert subprocess.check_output(command, text=True) == f"{expected}\n"
