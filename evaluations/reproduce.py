"""Reproduces the paper's Table 1: fetches weights, derains the test sets, measures, and sets our numbers beside the
paper's.

python evaluations/reproduce.py                                       # all that can be had
python evaluations/reproduce.py --datasets Rain200L --models NeRD-Rain-S
python evaluations/reproduce.py --datasets Rain200L --figure Rain200L/norain-1x2 Rain200L/norain-7x2@120,40,90,60

Result pictures of any method in results/<method>/<data set>/ are measured, too. Writes results/table.md, .csv and .tex.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python evaluations/reproduce.py`

from dataset_RGB import DATASETS, how_to_get
from evaluations import figure
from evaluations.evaluate import clean_folder, measure_pairs, of_expected, pair_results
from evaluations.table import COLUMNS, SETS, Row, Score, as_csv, as_latex, as_markdown, paper_scores, read_facts
from utils import download
from utils.checkpoint import load_network, network_name
from utils.devices import choose_device
from utils.errors import UserError, listed, reports_errors, sentence
from utils.files import write_csv, write_text
from utils.images import find_pictures, is_picture
from utils.inference import derain_file

MODELS = ("NeRD-Rain-S", "NeRD-Rain")


def holds_pictures(folder):
    return folder.is_dir() and any(is_picture(path) for path in folder.rglob("*"))


def get_weights(model, dataset, args):
    """The released weights of a model for a data set, fetched if they are not there -> path."""
    path = args.checkpoints_dir / model / f"{dataset}.pth"
    if path.exists():
        return path
    released = next(r for r in read_facts("released_weights.csv") if (r["model"], r["dataset"]) == (model, dataset))
    source = download.GOOGLE_DRIVE + released["google_drive_file_id"]
    if args.mirror:
        source = f"{args.mirror.rstrip('/')}/{model}/{dataset}.pth"
    print(f"{model} on {dataset}: fetching its weights from {source}")
    try:
        download.fetch_network(source, path, model)
    except UserError as error:
        raise UserError(
            f"{model} on {dataset} needs its weights. {sentence(error)} Download them from\n"
            f"  https://drive.google.com/file/d/{released['google_drive_file_id']}/view or\n"
            f"  {released['baidu_url']} (code {released['baidu_code']})\nand put them at {path}"
        ) from error
    return path


def derain_test_set(model, dataset, args):
    """Derains what has no result yet; nothing where as many results as pictures are there, whatever their names."""
    source, output_dir = args.data_dir / dataset / "test" / "input", args.results_dir / model / dataset
    if not holds_pictures(source):
        return
    paths, root = find_pictures(source)
    if holds_pictures(output_dir) and len(find_pictures(output_dir)[0]) >= len(paths):
        return
    weights = get_weights(model, dataset, args)
    net = load_network(weights)
    if network_name(net) != model:
        raise UserError(f"{weights} holds {network_name(net)}, not {model}: put the right weights there.")
    net = net.to(choose_device(args.gpus), memory_format=torch.channels_last).eval()
    outputs = {path: (output_dir / path.relative_to(root)).with_suffix(".png") for path in paths}
    outputs = {path: output for path, output in outputs.items() if not output.exists()}
    problems = []
    for path, output in tqdm(outputs.items(), f"{model} on {dataset}", unit="picture", disable=None):
        try:
            derain_file(net, path, output)
        except UserError as error:
            problems.append(sentence(error))
    if problems:
        raise UserError(f"{model} on {dataset}: {listed(problems, 3)}")


def methods_on(dataset, results_dir, paper):
    """The paper's methods in its order, then those of which there are only results."""
    known = [method for name, method in paper if name == dataset]
    found = sorted(path.parent.name for path in results_dir.glob(f"*/{dataset}") if holds_pictures(path))
    return [*known, *(method for method in found if method not in known)]


def measure_method(method, dataset, args):
    """-> Score, or None if nothing could be measured; list of sentences on what could not be."""
    pairs, unpaired = pair_results(args.results_dir / method / dataset, args.data_dir / dataset)
    rows, unmeasured = measure_pairs(pairs, DATASETS[dataset].protocol)
    if not rows:
        return None, [*unpaired, *unmeasured]
    psnr, ssim = (sum(column) / len(rows) for column in zip(*(values for _, values in rows)))
    print(f"{method}: {psnr:.4f} dB, {ssim:.6f}, {of_expected(len(rows), dataset)}")
    return Score(psnr, ssim, len(rows)), [*unpaired, *unmeasured]


def reproduce(args):
    """-> list of Row, list of sentences on what is missing."""
    rows, missing, paper = [], [], paper_scores()
    for dataset in args.datasets:
        has_targets = holds_pictures(clean_folder(args.data_dir / dataset))
        if not has_targets:
            missing.append(f"{args.data_dir / dataset / 'test'} is not there: {how_to_get(dataset)}")
        for model in args.models if has_targets else ():
            try:
                derain_test_set(model, dataset, args)
            except UserError as error:
                missing.append(sentence(error))
        for method in methods_on(dataset, args.results_dir, paper):
            score, problems = None, []
            if has_targets and holds_pictures(args.results_dir / method / dataset):
                score, problems = measure_method(method, dataset, args)
            if problems:
                missing.append(f"{method} on {dataset} could not be measured completely: {listed(problems, 3)}")
            rows.append(Row(dataset, method, score, paper.get((dataset, method))))
    return rows, missing


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SETS, default=SETS, metavar="SET", help=f"of {', '.join(SETS)} (default: all)")
    add("--models", nargs="*", choices=MODELS, default=MODELS, metavar="MODEL", help="what to derain with if needed")
    add("--data_dir", type=Path, default=Path("Datasets"), help="<set>/test/input and target (default: %(default)s)")
    add("--results_dir", type=Path, default=Path("results"), help="<method>/<set>/ (default: %(default)s)")
    add(
        "--checkpoints_dir",
        type=Path,
        default=Path("checkpoints/released"),
        help="<model>/<set>.pth (default: %(default)s)",
    )
    add("--mirror", help="folder or URL with <model>/<set>.pth, instead of Google Drive")
    add("--gpus", help="number of the GPU, or cpu (default: a GPU if there is one)")
    add("--output", type=Path, default=Path("results/table"), help="of .md, .csv and .tex (default: %(default)s)")
    add(
        "--figure",
        nargs="+",
        type=figure.parse_choice,
        metavar="SET/PICTURE[@X,Y,WIDTH,HEIGHT]",
        help="also draw these pictures by all methods, with a zoomed crop (default: where the rain is strongest)",
    )
    return parser.parse_args(argv)


@reports_errors
def main(argv=None):
    args = parse_args(argv)
    rows, missing = reproduce(args)
    table = as_markdown(rows, missing)
    write_text(f"{args.output}.md", table)
    write_csv(f"{args.output}.csv", COLUMNS, as_csv(rows))
    write_text(f"{args.output}.tex", as_latex(rows))
    print(f"\n{table}\nwritten to {args.output}.md, .csv and .tex")
    if args.figure:
        figure.write_comparison(args.figure, args.data_dir, args.results_dir, f"{args.output}_figure")
        print(f"and {args.output}_figure.png, .pdf")
    if missing:
        sys.exit(f"error: the table is made but for {len(missing)} entries, which its end lists.")


if __name__ == "__main__":
    main()
