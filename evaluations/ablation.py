"""The table of the ablations that were trained (bash train.sh ablation NAME), and the curves of their training.

    python evaluations/ablation.py --data Datasets/Rain200L/test

reads every checkpoints/Deraininig/models/ablation/NAME/SEED, derains the test pictures with its last weights, and
writes ablation.md, ablation.csv and ablation.png (needs matplotlib) to results/: parameters; multiply-adds of a 256×256
picture; PSNR and SSIM, the mean over the seeds and their standard deviation.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python evaluations/ablation.py`

from dataset_RGB import DATASETS, find_pairs, known_dataset
from evaluations.complexity import size_of
from evaluations.metrics import psnr_ssim
from utils.checkpoint import build_network, load_checkpoint
from utils.devices import add_gpus, choose_device
from utils.errors import UserError, reports_errors
from utils.files import atomic_write, write_csv, write_text
from utils.inference import Derainer
from utils.run_log import whole_lines

RUNS = Path("checkpoints/Deraininig/models/ablation")
SIDE = 256  # of the picture whose multiply-adds are counted


def find_runs(folder):
    """-> dict of ablation -> its runs' folders, by seed. Raises UserError if there is none."""
    runs = defaultdict(list)
    for latest in sorted(folder.glob("*/*/model_latest.pth")):
        runs[latest.parts[-3]].append(latest.parent)
    if not runs:
        raise UserError(f"{folder} holds no runs: train some with bash train.sh ablation NAME.")
    return runs


def score(derain, pairs, protocol):
    """-> mean PSNR and SSIM over pairs."""
    pictures = (pair.read() for pair in tqdm(pairs, unit="picture", disable=None, leave=False))
    return np.mean([psnr_ssim(derain(rainy), clean, protocol) for rainy, clean in pictures], axis=0)


def measure(runs, data, device):
    """-> rows: ablation, number of runs, epochs, parameters, multiply-adds, then for each test set the mean of PSNR,
    its deviation, and the same of SSIM."""
    rows = []
    for name, folders in runs.items():
        scores, epochs = [], set()
        for folder in folders:
            checkpoint = load_checkpoint(folder / "model_latest.pth")
            net = build_network(checkpoint, folder / "model_latest.pth")
            derain = Derainer(net.to(device), mode="window")
            means = [score(derain, pairs, protocol) for pairs, protocol in data.values()]
            shown = ", ".join(f"{test_set} {psnr:.2f}/{ssim:.4f}" for test_set, (psnr, ssim) in zip(data, means))
            print(f"{name}/{folder.name}: {shown}", flush=True)
            scores.append(np.ravel(means))
            epochs.add(checkpoint["epoch"])
        size = size_of(derain, np.zeros((SIDE, SIDE, 3), np.uint8))
        spread = [statistics.stdev(values) if len(values) > 1 else None for values in zip(*scores)]
        numbers = [value for pair in zip(np.mean(scores, axis=0), spread) for value in pair]
        rows.append([name, len(folders), "–".join(map(str, sorted({min(epochs), max(epochs)}))), *size, *numbers])
    return rows


def as_markdown(rows, data):
    header = ["ablation", "runs", "epochs", "parameters (M)", "multiply-adds (G)"]
    header += [f"{name} {metric}" for name in data for metric in ("PSNR", "SSIM")]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, count, epochs, parameters, multiply_adds, *scores in rows:
        cells = [name, str(count), epochs, f"{parameters / 1e6:.2f}", f"{multiply_adds / 1e9:.1f}"]
        for number, (mean, spread) in enumerate(zip(scores[::2], scores[1::2])):
            digits = 4 if number % 2 else 2
            cells.append(f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}"))
        lines.append(f"| {' | '.join(cells)} |")
    sets = [f"{name}: {len(pairs)} pictures, protocol `{protocol}`" for name, (pairs, protocol) in data.items()]
    return "\n".join([*lines, "", f"{'; '.join(sets)}. Mean over the runs ± standard deviation.", ""])


def draw_curves(runs, path):
    """Validation PSNR over the epochs, the mean of an ablation's runs with their range, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves were drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="PSNR of the validation patches, dB")
    for name, folders in runs.items():
        curves = []
        for folder in folders:
            lines = whole_lines(folder / "log.jsonl")
            curves.append({line["epoch"]: line["val_psnr"] for line in lines if "val_psnr" in line})
        epochs = sorted(set.intersection(*map(set, curves)))
        if not epochs:
            print(f"{name} has no curve: no epoch was validated in all of its runs")
            continue
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        (line,) = axes.plot(epochs, [statistics.mean(v) for v in values], label=name)
        axes.fill_between(epochs, *zip(*((min(v), max(v)) for v in values)), color=line.get_color(), alpha=0.15)
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
    parser.add_argument("--output", type=Path, default=Path("results"), help="where the table goes")
    add_gpus(parser)
    args = parser.parse_args(argv)
    runs = find_runs(args.runs)
    if missing := set(args.names or ()) - set(runs):
        raise UserError(f"{args.runs} holds no run of {', '.join(sorted(missing))}: it has {', '.join(runs)}.")
    runs = {name: runs[name] for name in args.names or runs}
    data = {}
    for folder in args.data:
        name = known_dataset(folder) or folder.name
        if name in data:
            raise UserError(f"{folder} and another test set are both called {name}: compare on one after the other.")
        data[name] = (find_pairs(folder), DATASETS[name].protocol if name in DATASETS else "rain200")
    rows = measure(runs, data, choose_device(args.gpus))
    print(table := as_markdown(rows, data))
    write_text(args.output / "ablation.md", table)
    columns = [f"{name} {what}" for name in data for what in ("PSNR", "PSNR deviation", "SSIM", "SSIM deviation")]
    header = ("ablation", "runs", "epochs", "parameters", "multiply-adds", *columns)
    write_csv(args.output / "ablation.csv", header, rows)
    draw_curves(runs, args.output / "ablation.png")


if __name__ == "__main__":
    main()
