"""Reproduces the paper's Table 1: fetches weights, derains the test sets, measures, and sets our numbers beside the
paper's.

python evaluations/reproduce.py                                       # all that can be had
python evaluations/reproduce.py --datasets Rain200L --models NeRD-Rain-S
python evaluations/reproduce.py --datasets Rain200L --figure Rain200L/norain-1x2 Rain200L/norain-7x2@120,40,90,60

Result pictures of any method in results/<method>/<data set>/ are measured, too. Writes results/table.md, .csv and .tex.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python evaluations/reproduce.py`

from dataset_RGB import DATASETS, how_to_get
from evaluations import figure
from evaluations.evaluate import count_problem, measure_pairs, of_expected, pair_results
from evaluations.table import COLUMNS, SETS, Row, Score, as_csv, as_latex, as_markdown, paper_scores, read_facts
from test import results_of, without_clashes
from utils.devices import add_gpus, choose_device
from utils.errors import UserError, listed, reports_errors, sentence
from utils.files import disk_failed, write_csv, write_text
from utils.formats import write_picture
from utils.images import find_pictures, holds_pictures
from utils.inference import Derainer
from utils.weights import RELEASED, load_released

MODELS = ("NeRD-Rain-S", "NeRD-Rain")


def derain_test_set(model, dataset, device, args):
    """Derains what has no result yet; nothing where as many results as pictures are there, whatever their names."""
    source, output_dir = args.data_dir / dataset / "test" / "input", args.results_dir / model / dataset
    results = len(find_pictures(output_dir)[0]) if holds_pictures(output_dir) else 0
    if not holds_pictures(source):
        if results < DATASETS[dataset].test_pairs:
            raise UserError(f"{source} is not there, which {model} would derain: {how_to_get(dataset)}")
        return
    paths, root = find_pictures(source)
    if results >= len(paths):
        return
    net = load_released(model, dataset, args.checkpoints_dir, args.mirror).to(device)
    outputs, clashes = without_clashes(results_of([(paths, root)], output_dir, keep_format=False), paths)
    outputs = {path: output for path, output in outputs.items() if not output.exists()}
    results = Derainer(net, mode="window").files(outputs, lambda path, _, result: write_picture(outputs[path], result))
    problems = list(clashes.values())
    for _, error in tqdm(results, f"{model} on {dataset}", len(outputs), unit="picture", disable=None):
        if isinstance(error, UserError):
            if disk_failed(error):
                raise error
            problems.append(sentence(error))
    if problems:
        raise UserError(f"{model} on {dataset} could not derain all pictures:{listed(problems, 3)}")


def methods_on(dataset, results_dir, paper):
    """The paper's methods in its order, then those of which there are only results."""
    known = [method for name, method in paper if name == dataset]
    found = sorted(path.parent.name for path in results_dir.glob(f"*/{dataset}") if holds_pictures(path))
    return [*known, *(method for method in found if method not in known)]


def measure_method(method, dataset, args):
    """-> Score, or None if nothing could be measured; list of sentences on what is not as it should be."""
    pairs, unpaired = pair_results(args.results_dir / method / dataset, args.data_dir / dataset / "test" / "target")
    rows, unmeasured = measure_pairs(pairs, DATASETS[dataset].protocol)
    problems = [*unpaired, *unmeasured, *count_problem(len(rows), dataset)]
    if not rows:
        return None, problems
    psnr, ssim = (sum(column) / len(rows) for column in zip(*(values for _, values in rows)))
    if psnr == math.inf:
        problems.append("some results are identical to their clean pictures")
    print(f"{method}: {psnr:.4f} dB, {ssim:.6f}, {of_expected(len(rows), dataset)}")
    return Score(psnr, ssim, len(rows)), problems


def reproduce(args):
    """-> list of Row, list of sentences on what is missing."""
    rows, missing, paper = [], [], paper_scores()
    device = choose_device(args.gpus)
    for dataset in dict.fromkeys(args.datasets):
        targets = args.data_dir / dataset / "test" / "target"
        has_targets = holds_pictures(targets)
        if not has_targets:
            missing.append(f"{targets} is not there: {how_to_get(dataset)}")
        for model in dict.fromkeys(args.models) if has_targets else ():
            try:
                derain_test_set(model, dataset, device, args)
            except torch.OutOfMemoryError:
                missing.append(f"{model} on {dataset} did not fit into the GPU's memory")
            except (UserError, OSError) as error:
                missing.append(sentence(error))
        for method in methods_on(dataset, args.results_dir, paper):
            score, problems = None, []
            if has_targets and holds_pictures(args.results_dir / method / dataset):
                score, problems = measure_method(method, dataset, args)
            if problems:
                missing.append(f"{method} on {dataset} is not complete:{listed(problems, 3)}")
            rows.append(Row(dataset, method, score, paper.get((dataset, method))))
    return rows, missing


def downloads_of(rows, results_dir):
    """-> list of sentences on where published result pictures of the methods without a number of ours are."""
    unmeasured = {(row.dataset, row.method) for row in rows if not row.ours}
    return [
        f"{fact['method']} on {fact['dataset']}: its pictures from {fact['baidu_url']} (code {fact['baidu_code']}), "
        f"put into {results_dir / fact['method'] / fact['dataset']}"
        for fact in read_facts("visual_results.csv")
        if (fact["dataset"], fact["method"]) in unmeasured and fact["baidu_code"]
    ]


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
        default=RELEASED,
        help="<model>/<set>.pth (default: %(default)s)",
    )
    add("--mirror", help="folder or URL with <model>/<set>.pth, instead of Google Drive")
    add_gpus(parser)
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
    write_text(f"{args.output}.md", as_markdown(rows, missing, downloads_of(rows, args.results_dir)))
    write_csv(f"{args.output}.csv", COLUMNS, as_csv(rows))
    write_text(f"{args.output}.tex", as_latex(rows))
    print(f"\n{as_markdown([row for row in rows if row.ours or row.method in args.models])}")
    print(f"written, with the paper's other methods, to {args.output}.md, .csv and .tex")
    if args.figure:
        try:
            figure.write_comparison(args.figure, args.data_dir, args.results_dir, f"{args.output}_figure")
            print(f"and {args.output}_figure.png, .pdf")
        except UserError as error:
            missing.append(f"no figure was drawn: {error}")
    if missing:
        sys.exit(f"error: the table is made, but not all could be measured:{listed(missing, len(missing))}")


if __name__ == "__main__":
    main()
