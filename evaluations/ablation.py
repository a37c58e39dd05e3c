"""The table of the ablations that were trained (bash train.sh ablation NAME), and the curves of their training.

python -m evaluations.ablation --data Datasets/Rain200L/test

Reads every checkpoints/Deraininig/models/ablation/NAME/SEED, derains the test pictures with its last weights, and
writes ablation.md and .png (needs matplotlib) to results/: parameters, multiply-adds of a 256×256 picture, PSNR
and SSIM, the mean over the seeds and their standard deviation.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluations.complexity import size_of
from evaluations.metrics import psnr_ssim
from utils.checkpoint import build_network, load_checkpoint
from utils.derain import Derainer
from utils.devices import add_gpus, choose_device
from utils.files import UserError, atomic_write, read_json_lines, reports_errors, write_text
from utils.pairs import DATASETS, find_pairs, known_dataset

RUNS = Path("checkpoints/Deraininig/models/ablation")


def find_runs(folder, names=None):
    """-> dict of ablation -> its runs' folders, by seed. Raises UserError where there is none."""
    runs = defaultdict(list)
    for latest in sorted(folder.glob("*/*/model_latest.pth")):
        runs[latest.parts[-3]].append(latest.parent)
    if not runs:
        raise UserError(f"{folder} holds no runs: train some with bash train.sh ablation NAME.")
    if missing := set(names or ()) - set(runs):
        raise UserError(f"{folder} holds no run of {', '.join(sorted(missing))}: it has {', '.join(runs)}.")
    return {name: runs[name] for name in names or runs}


def find_test_sets(folders):
    """-> dict of a test set's name -> its pairs and protocol."""
    data = {}
    for folder in folders:
        name = known_dataset(folder) or folder.name
        if name in data:
            raise UserError(f"{folder} and another test set are both called {name}: measure one after the other.")
        data[name] = (find_pairs(folder), DATASETS[name].protocol if name in DATASETS else "rain200")
    return data


def measure(name, folders, data, device):
    """Measures the runs of an ablation on test sets -> the cells of its row in the table."""
    scores, epochs = [], set()
    for folder in folders:
        path = folder / "model_latest.pth"
        checkpoint = load_checkpoint(path)
        net = build_network(checkpoint, path)
        derain = Derainer(net.to(device), mode="window")
        means = []
        for pairs, protocol in data.values():
            pictures = (pair.read() for pair in tqdm(pairs, unit="picture", disable=None, leave=False))
            means += [*np.mean([psnr_ssim(derain(rainy), clean, protocol) for rainy, clean in pictures], axis=0)]
        scores.append(means)
        epochs.add(checkpoint["epoch"])
    parameters, multiply_adds = size_of(net.options)
    cells = [name, str(len(folders)), "–".join(map(str, sorted({min(epochs), max(epochs)})))]
    cells += [f"{parameters / 1e6:.2f}", f"{multiply_adds / 1e9:.1f}"]
    for digits, values in zip([2, 4] * len(data), zip(*scores)):  # of PSNR, of SSIM
        deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{digits}f}{deviation}")
    return cells


def draw_curves(runs, path):
    """Draws the validation PSNR over the epochs as PNG, for each ablation the mean and range of its runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves were drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="PSNR of the validation patches, dB")
    for name, folders in runs.items():
        logs = [read_json_lines(folder / "log.jsonl") for folder in folders]
        curves = [{line["epoch"]: line["val_psnr"] for line in log if "val_psnr" in line} for log in logs]
        epochs = sorted(set.intersection(*map(set, curves)))  # validated in all runs
        values = np.array([[curve[epoch] for curve in curves] for epoch in epochs]).reshape(-1, len(curves))
        (line,) = axes.plot(epochs, values.mean(axis=1), label=name)
        axes.fill_between(epochs, values.min(axis=1), values.max(axis=1), color=line.get_color(), alpha=0.15)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of NAME/SEED (default: %(default)s)")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="test sets: folders of input/ and target/")
    parser.add_argument("--names", nargs="+", help="ablations to compare (default: all that were trained)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the table (default: results)")
    add_gpus(parser)
    args = parser.parse_args(argv)
    runs, data = find_runs(args.runs, args.names), find_test_sets(args.data)
    header = ["ablation", "runs", "epochs", "parameters (M)", "multiply-adds (G)"]
    header += [f"{name} {metric}" for name in data for metric in ("PSNR", "SSIM")]
    lines, device = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)], choose_device(args.gpus)
    for name, folders in runs.items():
        lines.append(f"| {' | '.join(measure(name, folders, data, device))} |")
        print(lines[-1])
    sets = [f"{name}: {len(pairs)} pictures, protocol `{protocol}`" for name, (pairs, protocol) in data.items()]
    lines += ["", f"{'; '.join(sets)}. Mean over the runs ± standard deviation.", ""]
    print("\n".join(lines))
    write_text(args.output / "ablation.md", "\n".join(lines))
    draw_curves(runs, args.output / "ablation.png")


if __name__ == "__main__":
    main()
