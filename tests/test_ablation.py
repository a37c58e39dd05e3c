import json
import statistics

import pytest
import torch

import train
from evaluations import ablation
from evaluations.metrics import psnr_ssim
from tests.conftest import make_pairs
from utils.checkpoint import load_network, save_checkpoint
from utils.derain import Derainer
from utils.pairs import find_pairs


@pytest.fixture
def runs(pairs_folder, tmp_path):
    """Runs of two ablations, trained for two epochs with a narrow network, one of them with two seeds."""
    folders = ["--train_dir", str(pairs_folder), "--val_dir", str(pairs_folder), "--model_save_dir", str(tmp_path)]
    size = ["--dim", "8", "--num_blocks", "1", "1", "1", "--patch_size", "32", "--num_epochs", "2", "--lr", "1e-3"]
    for name, seed in (("published", "1"), ("published", "2"), ("inr_none", "1")):
        train.main(["--ablation", name, "--seed", seed, "--num_workers", "0", "--gpus", "cpu", *folders, *size])
    return tmp_path / "Deraininig" / "models" / "ablation"


def test_the_table_and_the_curves_of_trained_ablations(runs, tmp_path, capsys):
    data = make_pairs(tmp_path / "data", count=2, seed=1)
    arguments = ["--runs", str(runs), "--data", str(data), "--output", str(tmp_path / "out"), "--gpus", "cpu"]
    ablation.main(arguments)
    table = (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "data: 2 pictures, protocol `rain200`" in table
    header, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[:4])
    rows = {row[0]: dict(zip(header, row)) for row in rows}
    pictures, means = [pair.read() for pair in find_pairs(data)], []
    for seed in "12":
        net = load_network(runs / "published" / seed / "model_latest.pth")
        derain = Derainer(net, mode="window")
        means.append(statistics.mean(psnr_ssim(derain(rainy), clean, "rain200")[0] for rainy, clean in pictures))
    mean, deviation = map(float, rows["published"]["data PSNR"].split(" ± "))
    assert mean == pytest.approx(statistics.mean(means), abs=0.006)
    assert deviation == pytest.approx(statistics.stdev(means), abs=0.006)
    assert (rows["published"]["runs"], rows["published"]["epochs"]) == ("2", "2")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert float(rows["published"]["parameters (M)"]) == pytest.approx(parameters / 1e6, abs=0.006)
    assert rows["inr_none"]["runs"] == "1" and "±" not in rows["inr_none"]["data PSNR"]
    assert float(rows["inr_none"]["multiply-adds (G)"]) < float(rows["published"]["multiply-adds (G)"])
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    (runs / "inr_none" / "1" / "log.jsonl").write_text(json.dumps({"epoch": 1}) + '\n{"epo')  # nothing to draw
    ablation.main([*arguments, "--names", "inr_none"])
    assert "published" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path):
    runs = tmp_path / "runs"
    data = [str(make_pairs(tmp_path / name / "test", count=1)) for name in "ab"]
    with pytest.raises(SystemExit, match=r"runs holds no runs: train some with bash train\.sh ablation NAME"):
        ablation.main(["--runs", str(runs), "--data", data[0]])
    save_checkpoint(runs / "published" / "1" / "model_latest.pth", epoch=1, state_dict={"weight": torch.zeros(1)})
    with pytest.raises(SystemExit, match="holds no run of x: it has published"):
        ablation.main(["--runs", str(runs), "--data", data[0], "--names", "x"])
    with pytest.raises(SystemExit, match="b/test and another test set are both called test"):
        ablation.main(["--runs", str(runs), "--data", *data])
