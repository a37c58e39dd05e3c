"""Measures derained pictures against clean ones, as the paper's tables do.

python -m evaluations.evaluate --results results/NeRD-Rain/Rain200L --targets Datasets/Rain200L/test

Prints the mean, the standard deviation and the worst pictures, and writes evaluation_<protocol>.csv (a row per picture)
and evaluation_<protocol>.json (the summary) into --output.
"""

import argparse
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluations.metrics import PROTOCOLS, other_conventions, psnr_ssim
from utils.files import UserError, counted, listed, reports_errors, software, write_csv, write_json
from utils.pairs import DATASETS, known_dataset, match_by_name
from utils.pictures import find_pictures

COLUMNS = ("psnr", "ssim", "psnr_y_unrounded", "psnr_rgb", "ssim_rgb")
WORST = 10


def clean_folder(root):
    """-> where a data set keeps its clean test pictures: root/test/target, root/target or root itself."""
    return next((folder for folder in (Path(root, "test/target"), Path(root, "target")) if folder.is_dir()), Path(root))


def pair_results(results, targets):
    """Pairs derained with clean pictures by name -> list of Pair, list of sentences on what has no partner.

    Where rainy pictures lie in input/ beside target/, each of them must have its result. One folder may hold both: N_DR
    is then the derained picture of N_GT, as in the MATLAB scripts for DID-Data and DDN-Data.
    """
    (results, results_root), (targets, targets_root) = find_pictures(results), find_pictures(clean_folder(targets))
    if results_root.resolve() == targets_root.resolve():
        results = [path for path in results if path.stem.endswith("_DR")]
        targets = [path for path in targets if path.stem.endswith("_GT")]
        if not results or not targets:
            raise UserError(f"{results_root} holds results and targets only if they are named N_DR and N_GT.")
    pairs, problems = match_by_name(results, targets, results_root, targets_root)
    found, wanted = Counter(pair.target for pair in pairs), Counter(targets)
    inputs_root = targets_root.with_name("input")
    if targets_root.name == "target" and inputs_root.is_dir():
        inputs = find_pictures(inputs_root)[0]
        wanted |= Counter(pair.target for pair in match_by_name(inputs, targets, inputs_root, targets_root)[0])
    for target in targets:
        if not found[target]:
            problems.append(f"{target} has no derained picture in {results_root}")
        elif found[target] < wanted[target]:
            numbers = f"{counted(found[target], 'derained picture')} in {results_root}, but {wanted[target]} rainy ones"
            problems.append(f"{target} has {numbers}")
    return pairs, problems


def measure_pairs(pairs, protocol, all_columns=False):
    """Measures derained pictures (`input`) against clean ones (`target`).

    Returns a list of (path of the result, its PSNR and SSIM, or all COLUMNS) in the order of `pairs`, and a list of
    sentences on pairs that cannot be read or compared.
    """

    def measure(pair):
        try:
            result, target = pair.read()
        except UserError as error:
            return str(error)
        others = other_conventions(result, target).values() if all_columns else ()
        return [*psnr_ssim(result, target, protocol), *others]

    with ThreadPoolExecutor() as pool:  # decoding and filtering release the interpreter's lock
        outcomes = list(tqdm(pool.map(measure, pairs), total=len(pairs), unit="picture", disable=None, leave=False))
    rows = [(pair.input, values) for pair, values in zip(pairs, outcomes) if not isinstance(values, str)]
    return rows, [problem for problem in outcomes if isinstance(problem, str)]


def count_problem(count, dataset):
    """-> list of a sentence if a known data set has another number of pictures."""
    if dataset is None or count == DATASETS[dataset].test_pairs:
        return []
    return [f"{counted(count, 'picture')} measured, but {dataset} has {DATASETS[dataset].test_pairs}"]


def of_expected(count, dataset):
    """-> such as "198 of the 200 pictures of Rain200L"."""
    if dataset is None:
        return f"{counted(count, 'picture')} (of no known data set, --dataset names it)"
    return f"{count} of the {DATASETS[dataset].test_pairs} pictures of {dataset}"


def summarise(rows, protocol, dataset):
    """-> dict of the mean, the standard deviation and the worst of rows (name, values of all COLUMNS)."""

    def named(values):  # JSON knows neither infinity nor NaN
        return {name: float(value) if math.isfinite(value) else None for name, value in zip(COLUMNS, values)}

    values = np.array([values for _, values in rows])
    with np.errstate(invalid="ignore"):  # infinite PSNR has no standard deviation
        deviation = values.std(axis=0)
    worst = sorted(rows, key=lambda row: row[1][0])[:WORST]
    return {
        "protocol": protocol,
        "dataset": dataset,
        "pictures": len(rows),
        "expected_pictures": DATASETS[dataset].test_pairs if dataset else None,
        "identical_pictures": int(np.isinf(values[:, 0]).sum()),
        "mean": named(values.mean(axis=0)),
        "standard_deviation": named(deviation),
        "worst": [{"picture": name, **named(numbers)} for name, numbers in worst],
        "software": software(),
    }


def print_summary(summary):
    width = max(20, *(len(row["picture"]) for row in summary["worst"]))

    def print_line(title, row):
        print(f"{title:{width}}", *("–".rjust(16) if row[name] is None else f"{row[name]:16.6f}" for name in COLUMNS))

    print(" " * width, *(f"{name:>16}" for name in COLUMNS))
    print_line("mean", summary["mean"])
    print_line("standard deviation", summary["standard_deviation"])
    print(f"worst {len(summary['worst'])}:")
    for row in summary["worst"]:
        print_line(row["picture"], row)
    print(f"{of_expected(summary['pictures'], summary['dataset'])}, protocol {summary['protocol']}")
    if summary["identical_pictures"]:
        print(f"identical to their clean pictures: {summary['identical_pictures']}. Are these results?")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", required=True, help="derained pictures")
    add("--targets", required=True, help="clean pictures, or a data set's folder with them in target/")
    add("--protocol", choices=PROTOCOLS, help="default: the data set's in the paper")
    add("--dataset", choices=DATASETS, help="sets protocol and number of pictures (default: from the folders' names)")
    add("--output", type=Path, help="folder of the two files (default: that of the results)")
    add("--go_on", action="store_true", help="average over what is there although pictures are missing")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or known_dataset(args.targets) or known_dataset(args.results)
    if not args.protocol and not args.dataset:
        parser.error("the folders' names tell no data set: give --protocol rain200 or --protocol did")
    args.protocol = args.protocol or DATASETS[args.dataset].protocol
    return args


@reports_errors
def main(argv=None):
    args = parse_args(argv)
    pairs, unpaired = pair_results(args.results, args.targets)
    measured, unmeasured = measure_pairs(pairs, args.protocol, all_columns=True)
    root = find_pictures(args.results)[1]
    rows = [(str(path.relative_to(root)), values) for path, values in measured]
    problems = [*unpaired, *unmeasured, *count_problem(len(rows), args.dataset)]
    if problems and not (rows and args.go_on):
        hint = f"\n--go_on averages over {of_expected(len(rows), args.dataset)} all the same." if rows else ""
        raise UserError(f"the results are not complete:{listed(problems)}{hint}")
    summary = {**summarise(rows, args.protocol, args.dataset), "left_out": problems}
    print_summary(summary)
    if problems:
        print(f"left out:{listed(problems)}")
    folder = args.output or root
    write_csv(folder / f"evaluation_{args.protocol}.csv", ("picture", *COLUMNS), [(name, *v) for name, v in rows])
    write_json(folder / f"evaluation_{args.protocol}.json", summary)


if __name__ == "__main__":
    main()
