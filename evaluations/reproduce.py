"""Reproduces the paper's Table 1: fetches the released weights, derains the test sets, measures the results, and sets
our numbers beside the paper's.

python -m evaluations.reproduce                                             # all five sets, NeRD-Rain and NeRD-Rain-S
python -m evaluations.reproduce --datasets Rain200L --models NeRD-Rain-S

Result pictures of any method in results/<method>/<data set>/ are measured, too. Writes results/table.md, .csv and .tex.
"""

import argparse
import itertools
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluations.evaluate import measure, of_expected
from evaluations.metrics import psnr_ssim
from utils.derain import SETTINGS, Derainer, is_current, remember_settings, results_settings
from utils.devices import add_gpus, choose_device
from utils.files import UserError, disk_failed, listed, reports_errors, software, write_csv, write_text
from utils.pairs import DATASETS, how_to_get
from utils.pictures import find_pictures, is_picture
from utils.weights import load_released, read_facts, released_path

SETS = ("Rain200L", "Rain200H", "DID-Data", "DDN-Data", "SPA-Data")
MODELS = ("NeRD-Rain-S", "NeRD-Rain")
HEADER = ("method", "PSNR", "paper", "difference", "SSIM", "paper", "difference", "pictures")
FORMATS = {"psnr": ".2f", "paper_psnr": ".2f", "psnr_difference": "+.2f"}
FORMATS |= {"ssim": ".4f", "paper_ssim": ".4f", "ssim_difference": "+.4f"}
COLUMNS = ("dataset", "protocol", "method", *FORMATS, "pictures", "expected_pictures")


def paper_scores(dataset):
    """Table 1 of the paper for one data set -> dict of method -> (PSNR, SSIM), in the table's order."""
    rows = read_facts("paper_table1.csv")
    return {row["method"]: (float(row[f"{dataset}_psnr"]), float(row[f"{dataset}_ssim"])) for row in rows}


def table_row(dataset, method, ours, paper, pictures=None):
    """-> dict of COLUMNS. Ours and the paper's are (PSNR, SSIM), or None where there is none."""
    recipe = DATASETS[dataset]
    row = {"dataset": dataset, "protocol": recipe.protocol, "method": method}
    for metric, our_value, paper_value in zip(("psnr", "ssim"), ours or (None, None), paper or (None, None)):
        row |= {metric: our_value, f"paper_{metric}": paper_value}
        row[f"{metric}_difference"] = our_value - paper_value if ours and paper else None
    return {**row, "pictures": pictures, "expected_pictures": recipe.test_pairs}


def cells(row):
    """-> the text of a row under HEADER."""
    numbers = ["–" if row[name] is None else format(row[name], form) for name, form in FORMATS.items()]
    pictures = f"{row['pictures']} of {row['expected_pictures']}" if row["pictures"] else "not measured"
    return [row["method"], *numbers, pictures]


def as_markdown(table, missing=(), downloads=()):
    """-> a table for each data set; `table` is a dict of data set -> rows."""
    lines = []
    for dataset, rows in table.items():
        lines += [f"### {dataset}, protocol `{DATASETS[dataset].protocol}`", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += [*(f"| {' | '.join(cells(row))} |" for row in rows), ""]
    lines.append("Made with " + ", ".join(f"{name} {version}" for name, version in software().items()) + ".")
    for title, sentences in (("Missing", missing), ("Could be measured, too", downloads)):
        if sentences:
            lines += ["", f"### {title}", "", *("- " + text.replace("\n", "\n  ") for text in sentences)]
    return "\n".join(lines) + "\n"


def as_latex(table):
    """-> a tabular for papers (package booktabs)."""
    lines = [r"\begin{tabular}{lccccccc}", r"\toprule", " & ".join(HEADER) + r" \\"]
    for dataset, rows in table.items():
        title = f"{dataset} ({DATASETS[dataset].protocol})"
        lines += [r"\midrule", rf"\multicolumn{{8}}{{c}}{{{title}}} \\", r"\midrule"]
        for row in rows:
            escaped = [re.sub(r"([_&%#${}])", r"\\\1", cell).replace("–", "--") for cell in cells(row)]
            lines.append(" & ".join(escaped) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def holds_pictures(folder):
    return any(map(is_picture, folder.rglob("*")))


def derain_test_set(model, dataset, device, args):
    """Derains the test pictures that have no result by these weights, and leaves pictures of other origin as they are.

    Returns a list of sentences on pictures that failed. Raises UserError if none could be derained.
    """
    source, results = args.data_dir / dataset / "test" / "input", args.results_dir / model / dataset
    if holds_pictures(results) and not Path(results, SETTINGS).exists():
        print(f"{results} has no settings.json: its pictures are measured as they are. Remove them to make new ones.")
        return []
    if not holds_pictures(source):
        raise UserError(f"{source} does not exist; {model} needs it: {how_to_get(dataset)}")
    net = load_released(model, dataset, args.mirror).to(device)
    derainer = Derainer(net, mode="window")
    settings = results_settings(released_path(model, dataset), derainer, [source])
    remember_settings(results, settings)
    paths, root = find_pictures(source)
    outputs = {path: (results / path.relative_to(root)).with_suffix(".png") for path in paths}
    outputs = {path: output for path, output in outputs.items() if not is_current(output, path, settings, results)}
    derained, problems = derainer.files(outputs), []
    for _, error in tqdm(derained, f"{model} on {dataset}", len(outputs), unit="picture", disable=None):
        if error:
            if disk_failed(error):
                raise error
            problems.append(str(error))
    return problems


def reproduce_set(dataset, device, args):
    """-> rows of the table for one data set, list of sentences on what is missing or odd."""
    targets, paper = args.data_dir / dataset / "test" / "target", paper_scores(dataset)
    if not holds_pictures(targets):
        rows = [table_row(dataset, method, None, scores) for method, scores in paper.items()]
        return rows, [f"{targets} does not exist: {how_to_get(dataset)}"]
    missing, failed = [], set()
    for model in args.models:
        try:
            problems = derain_test_set(model, dataset, device, args)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            failed.add(model)  # what lies in its folder may be of other weights
            missing.append(f"{model} on {dataset} was not derained: {error}")
        else:
            missing += [f"{model} on {dataset}: {problem}" for problem in problems[:3]]
    found = {path.parent.name: path for path in sorted(args.results_dir.glob(f"*/{dataset}")) if holds_pictures(path)}
    rows = []
    for method in dict.fromkeys([*paper, *found]):
        measured, problems, ours = [], [], None
        if method in found and method not in failed:
            scores = partial(psnr_ssim, protocol=DATASETS[dataset].protocol)
            measured, problems = measure(found[method], targets, scores, dataset)
        if measured:
            ours = np.mean([values for _, values in measured], axis=0).tolist()
            print(f"{method}: {ours[0]:.4f} dB, {ours[1]:.6f}, {of_expected(len(measured), dataset)}")
        if problems:
            missing.append(f"{method} on {dataset} is not complete:{listed(problems, 3)}")
        rows.append(table_row(dataset, method, ours, paper.get(method), len(measured)))
    return rows, missing


def downloads_of(rows, results_dir):
    """-> list of sentences on where the result pictures of methods that were not measured can be downloaded."""
    unmeasured = {(row["dataset"], row["method"]) for row in rows if not row["pictures"]}
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
    add("--mirror", help="folder or URL with <model>/<set>.pth, instead of Google Drive")
    add("--output", type=Path, default=Path("results/table"), help="of .md, .csv and .tex (default: %(default)s)")
    add_gpus(parser)
    args = parser.parse_args(argv)
    device, table, missing = choose_device(args.gpus), {}, []
    for dataset in args.datasets:
        table[dataset], problems = reproduce_set(dataset, device, args)
        missing += problems
    rows = list(itertools.chain(*table.values()))
    write_text(f"{args.output}.md", as_markdown(table, missing, downloads_of(rows, args.results_dir)))
    write_csv(f"{args.output}.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    write_text(f"{args.output}.tex", as_latex(table))
    for dataset, methods in table.items():
        table[dataset] = [row for row in methods if row["pictures"] or row["method"] in args.models]
    print(f"\n{as_markdown(table)}")
    print(f"written, with the paper's other methods, to {args.output}.md, .csv and .tex")
    if missing:
        sys.exit(f"error: the table was written, but not everything could be measured:{listed(missing, len(missing))}")


if __name__ == "__main__":
    main()
