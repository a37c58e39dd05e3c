import json
import statistics

import pytest

import train
from evaluations import ablation
from evaluations.metrics import psnr_ssim
from tests.conftest import NARROW_OPTIONS, failure, make_pairs, save_narrow
from utils.checkpoint import load_network
from utils.derain import Derainer
from utils.pairs import find_pairs


def test_the_table_and_the_curves_of_trained_ablations(pairs_folder, tmp_path, capsys):
    """Two ablations, trained for two epochs with a narrow network, one of them with two seeds."""
    folders = ["--train_dir", str(pairs_folder), "--val_dir", str(pairs_folder), "--model_save_dir", str(tmp_path)]
    size = [*NARROW_OPTIONS, "--patch_size", "32", "--num_epochs", "2", "--lr", "1e-3"]
    for name, seed in (("published", "1"), ("published", "2"), ("inr_none", "1")):
        train.main(["--ablation", name, "--seed", seed, "--num_workers", "0", "--gpus", "cpu", *folders, *size])
    runs = tmp_path / "Deraininig" / "models" / "ablation"
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
    data, other_data = (str(make_pairs(tmp_path / name / "test", count=1)) for name in "ab")
    arguments = ["--runs", str(tmp_path / "runs"), "--data", data]
    assert "runs holds no runs: train some with bash train.sh ablation NAME" in failure(ablation.main, arguments)
    save_narrow(tmp_path / "runs" / "published" / "1" / "model_latest.pth")
    assert "holds no run of x: it has published" in failure(ablation.main, [*arguments, "--names", "x"])
    assert "b/test and another test set are both called test" in failure(ablation.main, [*arguments, other_data])
