"""Reproduces the paper's Table 1: fetches the released weights, derains the test sets, measures the results, and sets
our numbers beside the paper's.

python -m evaluations.reproduce                                             # all five sets, NeRD-Rain and NeRD-Rain-S
python -m evaluations.reproduce --datasets Rain200L --models NeRD-Rain-S

Result pictures of any method in results/<method>/<data set>/ are measured, too. Writes results/table.md, .csv and .tex.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluations.evaluate import count_problem, measure_pairs, of_expected, pair_results
from utils.derain import Derainer, is_current, remember_settings, remembered_settings, results_settings
from utils.devices import add_gpus, choose_device
from utils.files import UserError, disk_failed, listed, reports_errors, sentence, software, write_csv, write_text
from utils.pairs import DATASETS, how_to_get
from utils.pictures import find_pictures, is_picture, write_picture
from utils.weights import RELEASED, load_released, released_path

FACTS = Path(__file__).parent
SETS = ("Rain200L", "Rain200H", "DID-Data", "DDN-Data", "SPA-Data")
MODELS = ("NeRD-Rain-S", "NeRD-Rain")
HEADER = ("method", "PSNR", "paper", "difference", "SSIM", "paper", "difference", "pictures")
COLUMNS = (
    *("dataset", "protocol", "method", "psnr", "paper_psnr", "psnr_difference"),
    *("ssim", "paper_ssim", "ssim_difference", "pictures", "expected_pictures"),
)


class Score(NamedTuple):
    """Mean PSNR in dB and SSIM, and over how many pictures (None: the paper does not say)."""

    psnr: float
    ssim: float
    pictures: int | None = None


class Row(NamedTuple):
    """One method on one data set. Scores that do not exist are None."""

    dataset: str
    method: str
    ours: Score | None
    paper: Score | None

    def numbers(self):
        """-> PSNR, the paper's, their difference, SSIM, the paper's, their difference."""
        values = []
        for ours, paper in zip((self.ours or (None, None))[:2], (self.paper or (None, None))[:2]):
            values += [ours, paper, None if ours is None or paper is None else ours - paper]
        return values

    def cells(self):
        """-> the row's cells after the method's name, as text."""
        formats = (".2f", ".2f", "+.2f", ".4f", ".4f", "+.4f")
        cells = ["–" if value is None else format(value, form) for form, value in zip(formats, self.numbers())]
        expected = DATASETS[self.dataset].test_pairs
        return [*cells, f"{self.ours.pictures} of {expected}" if self.ours else "only the paper's number"]


def read_facts(name):
    with open(FACTS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_scores():
    """Table 1 of the paper -> dict of (data set, method) -> Score, in the table's order."""
    rows = read_facts("paper_table1.csv")
    return {
        (dataset, row["method"]): Score(float(row[f"{dataset}_psnr"]), float(row[f"{dataset}_ssim"]))
        for dataset in SETS
        for row in rows
    }


def as_markdown(rows, missing=(), downloads=()):
    lines = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        lines += [f"### {dataset}, protocol `{DATASETS[dataset].protocol}`", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += [f"| {row.method} | {' | '.join(row.cells())} |" for row in rows if row.dataset == dataset]
        lines.append("")
    lines.append("Made with " + ", ".join(f"{name} {version}" for name, version in software().items()) + ".")
    for title, sentences in (("Missing", missing), ("Could be measured, too", downloads)):
        if sentences:
            lines += ["", f"### {title}", "", *("- " + text.replace("\n", "\n  ") for text in sentences)]
    return "\n".join(lines) + "\n"


def as_latex(rows):
    """-> a tabular for papers (package booktabs)."""
    lines = [r"\begin{tabular}{lccccccc}", r"\toprule", " & ".join(HEADER) + r" \\"]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        protocol = DATASETS[dataset].protocol
        lines += [r"\midrule", rf"\multicolumn{{8}}{{c}}{{{dataset} ({protocol})}} \\", r"\midrule"]
        for row in rows:
            if row.dataset == dataset:
                method = "".join(f"\\{c}" if c in "_&%#${}" else c for c in row.method)
                lines.append(" & ".join([method, *row.cells()]).replace("–", "--") + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(rows):
    """-> list of rows in the order of COLUMNS."""
    return [
        [row.dataset, DATASETS[row.dataset].protocol, row.method, *row.numbers()]
        + [row.ours.pictures if row.ours else None, DATASETS[row.dataset].test_pairs]
        for row in rows
    ]


def holds_pictures(folder):
    return any(map(is_picture, folder.rglob("*")))


def derain_test_set(model, dataset, device, args):
    """Derains the test pictures that have no result by these weights, and leaves pictures of other origin as they are.

    Returns a list of sentences on pictures that failed. Raises UserError if none could be derained.
    """
    source, results = args.data_dir / dataset / "test" / "input", args.results_dir / model / dataset
    if holds_pictures(results) and not remembered_settings(results):
        print(f"{results} has no settings.json: its pictures are measured as they are. Remove them to make new ones.")
        return []
    if not holds_pictures(source):
        raise UserError(f"{source} is not there, which {model} would derain: {how_to_get(dataset)}")
    net = load_released(model, dataset, args.checkpoints_dir, args.mirror).to(device)
    derainer = Derainer(net, mode="window")
    settings = results_settings(released_path(model, dataset, args.checkpoints_dir), derainer)
    remember_settings(results, settings)
    paths, root = find_pictures(source)
    outputs = {path: (results / path.relative_to(root)).with_suffix(".png") for path in paths}
    outputs = {path: output for path, output in outputs.items() if not is_current(output, settings, results)}
    derained = derainer.files(outputs, lambda path, _, result: write_picture(outputs[path], result))
    problems = []
    for _, error in tqdm(derained, f"{model} on {dataset}", len(outputs), unit="picture", disable=None):
        if isinstance(error, UserError):
            if disk_failed(error):
                raise error
            problems.append(sentence(error))
    return problems


def measure_method(method, dataset, args):
    """-> Score, or None if nothing could be measured; list of sentences on what is missing or odd."""
    pairs, unpaired = pair_results(args.results_dir / method / dataset, args.data_dir / dataset / "test" / "target")
    rows, unmeasured = measure_pairs(pairs, DATASETS[dataset].protocol)
    problems = [*unpaired, *unmeasured, *count_problem(len(rows), dataset)]
    if not rows:
        return None, problems
    psnr = sum(values[0] for _, values in rows) / len(rows)
    ssim = sum(values[1] for _, values in rows) / len(rows)
    if psnr == math.inf:
        problems.append("some results are identical to their clean pictures")
    print(f"{method}: {psnr:.4f} dB, {ssim:.6f}, {of_expected(len(rows), dataset)}")
    return Score(psnr, ssim, len(rows)), problems


def reproduce(args):
    """-> list of Row, list of sentences on what is missing."""
    rows, missing, paper = [], [], paper_scores()
    device = choose_device(args.gpus)
    for dataset in dict.fromkeys(args.datasets):
        targets, failed = args.data_dir / dataset / "test" / "target", set()
        measurable = holds_pictures(targets)
        if not measurable:
            missing.append(f"{targets} is not there: {how_to_get(dataset)}")
        for model in dict.fromkeys(args.models) if measurable else ():
            try:
                problems = derain_test_set(model, dataset, device, args)
            except (UserError, OSError, torch.OutOfMemoryError) as error:
                failed.add(model)  # what lies in its folder may be of other weights
                missing.append(f"{model} on {dataset} was not derained: {sentence(error)}")
            else:
                missing += [f"{model} on {dataset}: {problem}" for problem in problems[:3]]
        methods = [method for name, method in paper if name == dataset]
        found = sorted(path.parent.name for path in args.results_dir.glob(f"*/{dataset}") if holds_pictures(path))
        for method in dict.fromkeys([*methods, *found]):
            score = None
            if measurable and method in found and method not in failed:
                score, problems = measure_method(method, dataset, args)
                if problems:
                    missing.append(f"{method} on {dataset} is not complete:{listed(problems, 3)}")
            rows.append(Row(dataset, method, score, paper.get((dataset, method))))
    return rows, missing


def downloads_of(rows, results_dir):
    """-> list of sentences on where the result pictures of methods that were not measured can be downloaded."""
    unmeasured = {(row.dataset, row.method) for row in rows if not row.ours}
    return [
        f"{fact['method']} on {fact['dataset']}: download its pictures from {fact['baidu_url']} (code "
        f"{fact['baidu_code']}) and put them into {results_dir / fact['method'] / fact['dataset']}"
        for fact in read_facts("visual_results.csv")
        if (fact["dataset"], fact["method"]) in unmeasured and fact["baidu_code"]
    ]


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SETS, default=SETS, metavar="SET", help=f"of {', '.join(SETS)} (default: all)")
    add("--models", nargs="*", choices=MODELS, default=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add("--data_dir", type=Path, default=Path("Datasets"), help="<set>/test/input and target (default: %(default)s)")
    add("--results_dir", type=Path, default=Path("results"), help="<method>/<set>/ (default: %(default)s)")
    add("--checkpoints_dir", type=Path, default=RELEASED, help="<model>/<set>.pth (default: %(default)s)")
    add("--mirror", help="folder or URL with <model>/<set>.pth, instead of Google Drive")
    add("--output", type=Path, default=Path("results/table"), help="of .md, .csv and .tex (default: %(default)s)")
    add_gpus(parser)
    args = parser.parse_args(argv)
    rows, missing = reproduce(args)
    write_text(f"{args.output}.md", as_markdown(rows, missing, downloads_of(rows, args.results_dir)))
    write_csv(f"{args.output}.csv", COLUMNS, as_csv(rows))
    write_text(f"{args.output}.tex", as_latex(rows))
    print(f"\n{as_markdown([row for row in rows if row.ours or row.method in args.models])}")
    print(f"written, with the paper's other methods, to {args.output}.md, .csv and .tex")
    if missing:
        sys.exit(f"error: the table is made, but not all could be measured:{listed(missing, len(missing))}")


if __name__ == "__main__":
    main()
