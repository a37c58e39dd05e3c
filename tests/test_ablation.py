import csv
import signal
import subprocess

import pytest
import torch

import train
from evaluations import ablation
from losses import DerainLoss
from model import MultiscaleNet, Points
from tests.conftest import make_pairs
from tests.golden import golden_input
from tests.test_train_script import ROOT
from utils.checkpoint import load_checkpoint, load_network


@pytest.fixture
def train_one(pairs_folder, tmp_path):
    """Trains an ablation for two epochs, of which the second learns, with a narrow network -> its run's folder."""

    def run(name, seed=1, *options):
        folders = ["--train_dir", str(pairs_folder), "--val_dir", str(pairs_folder), "--model_save_dir", str(tmp_path)]
        size = ["--dim", "8", "--num_blocks", "1", "1", "1", "--patch_size", "32", "--num_epochs", "2", "--lr", "1e-3"]
        train.main(["--ablation", name, "--seed", str(seed), "--num_workers", "0", *folders, *size, *options])
        return tmp_path / "Deraininig" / "models" / "ablation" / name / str(seed)

    return run


@pytest.mark.parametrize("name", train.ABLATIONS)
def test_every_ablation_has_its_network_session_and_settings(name):
    args = train.parse_args(["--ablation", name, "--dim", "8", "--num_blocks", "1", "1", "1", "--seed", "3"])
    net, changed = train.make_network(args, None, {}), train.ABLATIONS[name]
    given = vars(args) | net.options
    assert given["session"] == f"ablation/{name}/3" and {key: given[key] for key in changed} == changed
    assert (net.options["heads"] is None) == (name == "mprnet") and net.options["dim"] == 8


@pytest.mark.parametrize("name", ["mprnet", "inr_coordinate_random", "loss_guard"])
def test_ablations_train_and_are_recognised_from_their_files(train_one, name):
    folder = train_one(name)
    net = load_network(folder / "model_latest.pth")
    assert (net.options["heads"] is None) == (name == "mprnet")
    assert net.inr == ("coordinate_random" if name == "inr_coordinate_random" else "published")
    assert (load_checkpoint(folder / "model_latest.pth")["usual_loss"] is None) == (name != "loss_guard")


def test_two_test_sets_of_one_name_are_refused(train_one, tmp_path):
    train_one("published")
    data = [str(make_pairs(tmp_path / name / "test", count=1)) for name in "ab"]
    with pytest.raises(SystemExit, match=f"{data[1]} and another test set are both called test"):
        ablation.main(["--runs", str(tmp_path / "Deraininig" / "models" / "ablation"), "--data", *data])


def test_the_table_tells_ablations_apart(train_one, tmp_path, capsys):
    for name, seed in (("published", 1), ("published", 2), ("inr_none", 1)):
        train_one(name, seed)
    data = make_pairs(tmp_path / "data", count=2, seed=1)
    runs = tmp_path / "Deraininig" / "models" / "ablation"
    arguments = ["--runs", str(runs), "--data", str(data), "--output", str(tmp_path / "out"), "--gpus", "cpu"]
    ablation.main(arguments)
    with open(tmp_path / "out" / "ablation.csv") as file:
        rows = {row["ablation"]: row for row in csv.DictReader(file)}
    assert {name: row["runs"] for name, row in rows.items()} == {"inr_none": "1", "published": "2"}
    assert int(rows["inr_none"]["multiply-adds"]) < int(rows["published"]["multiply-adds"])
    net = load_network(runs / "published" / "1" / "model_latest.pth")
    assert int(rows["published"]["parameters"]) == sum(p.numel() for p in net.parameters())
    assert float(rows["published"]["data PSNR deviation"]) > 0 and rows["inr_none"]["data PSNR deviation"] == ""
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000
    assert f"| published | 2 | 2 | {float(rows['published']['parameters']) / 1e6:.2f} |" in capsys.readouterr().out
    (runs / "inr_none" / "1" / "log.jsonl").write_text('{"epoch": 1}\n{"epo')
    ablation.main(arguments)
    assert "inr_none has no curve" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no run of x: it has inr_none, published"):
        ablation.main([*arguments, "--names", "x"])
    with pytest.raises(SystemExit, match=r"train some with bash train\.sh ablation NAME"):
        ablation.main(["--runs", str(tmp_path / "out"), "--data", str(data)])


def test_train_sh_takes_the_name_of_an_ablation():
    run = subprocess.run(["bash", "train.sh", "ablation", "x"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "--ablation: invalid choice: 'x'" in run.stderr and "inr_coordinate" in run.stderr


def test_beyond_the_paper_each_option_changes_what_it_names():
    x = golden_input("input", 1, 3, 32, 32)
    weights = MultiscaleNet(8, (1, 1, 1)).state_dict()
    nets = [MultiscaleNet(8, (1, 1, 1), **options) for options in ({}, {"own_reduce": True}, {"antialias": True})]
    for net in nets:
        net.load_state_dict(weights)
    published, own_reduce, antialias = (net(x) for net in nets)
    assert not torch.equal(published[0], own_reduce[0]) and torch.equal(published[3], own_reduce[3])
    means = x.unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean(dim=(3, 5))
    torch.testing.assert_close(antialias[6], means, rtol=0, atol=1e-6)
    assert torch.equal(published[6], x[..., ::4, ::4])
    own_reduce[0].mean().backward()
    assert nets[1].reduce_chan_level1_max3.weight.grad.abs().sum() > 0


def test_without_the_zero_epoch_the_schedule_is_one_epoch_ahead():
    rates = {}
    for ahead in (False, True):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
        schedule = train.make_schedule(optimizer, 20 - ahead, 0, ahead)
        rates[ahead] = []
        for _ in range(20 - ahead):
            rates[ahead].append(optimizer.param_groups[0]["lr"])
            schedule.step()
    assert rates[False][0] == 0 and rates[True] == pytest.approx(rates[False][1:], rel=1e-12)


def test_an_interruption_within_an_epoch_moves_no_random_position(train_one, monkeypatch):
    finished, asked = train.Trainer.train_step, []

    def ask_once_in_step_2(trainer, *args, **options):
        values = finished(trainer, *args, **options)
        if trainer.step == 2 and not asked:
            asked.append(trainer.interruption.ask(signal.SIGINT, None))
        return values

    options = ["--num_epochs", "1", "--no_zero_epoch", "--session"]
    whole = train_one("inr_coordinate_random", 1, *options, "whole").parents[2] / "whole"
    monkeypatch.setattr(train.Trainer, "train_step", ask_once_in_step_2)
    with pytest.raises(SystemExit):
        train_one("inr_coordinate_random", 1, *options, "parts")
    train_one("inr_coordinate_random", 1, *options, "parts")
    first, second = (load_checkpoint(whole.with_name(name) / "model_latest.pth") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())


def test_a_guarded_batch_gives_a_smaller_gradient(train_one, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def observed(optimizer, *args):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", observed)
    train_one("loss_guard", 1, "--num_epochs", "1", "--loss_guard", "0.5", "--session", "weak")
    train_one("published", 1, "--num_epochs", "1", "--session", "plain")
    weak, plain = norms[:6], norms[6:]
    assert weak[0] == pytest.approx(plain[0]) and all(w < 0.9 * p for w, p in zip(weak[1:], plain[1:], strict=True))


def test_random_positions_are_supervised_by_the_picture_between_its_pixels():
    rows, columns = torch.meshgrid(*[-1 + (2 * torch.arange(16) + 1) / 16] * 2, indexing="ij")
    ramp = torch.stack([rows, columns, rows + 2 * columns])[None].expand(2, -1, -1, -1)
    positions = torch.rand(50, 2) * 1.8 - 0.9
    points = Points(None, positions)
    expected = torch.stack([positions[:, 0], positions[:, 1], positions @ torch.tensor([1.0, 2.0])])
    torch.testing.assert_close(points.colours_of(ramp), expected.expand(2, -1, -1), rtol=0, atol=1e-6)

    torch.manual_seed(0)
    net = MultiscaleNet(8, (1, 1, 1), inr="coordinate_random")
    x = golden_input("input", 2, 3, 32, 32)
    outputs = net(x)
    assert [outputs[i].colours.shape for i in (3, 5)] == [(2, 3, 32 * 32), (2, 3, 16 * 16)]
    exact = [
        output and output._replace(colours=output.colours_of(t)) if isinstance(output, Points) else output
        for output, t in zip(outputs, [None, None, None, x, None, DerainLoss().pyramid(x)[1], None])
    ]
    assert DerainLoss()(exact, x)["l1"] == 0 < DerainLoss()(outputs, x)["l1"]
    assert [output.shape for output in net.eval()(x)[3::2]] == [(2, 3, 32, 32), (2, 3, 16, 16)]


@torch.inference_mode()
def test_heads_render_at_any_size():
    torch.manual_seed(0)
    net, x = MultiscaleNet(8, (1, 1, 1), inr="coordinate").eval(), golden_input("input", 1, 3, 32, 32)
    outputs = net(x)
    assert torch.equal(net.render_image(x, "mid", (32, 32)), outputs[3])
    assert torch.equal(net.render_image(x, "small", (16, 16)), outputs[5])
    large = net.render_image(x, "mid", (96, 80))
    assert large.shape == (1, 3, 96, 80) and large.isfinite().all()
