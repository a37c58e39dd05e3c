"""Measures derained pictures against clean ones, as the paper's tables do.

python evaluations/evaluate.py --results results/NeRD-Rain/Rain200L --targets Datasets/Rain200L/test --protocol rain200

Prints the means and the worst pictures, and writes evaluation_<protocol>.csv (a row per picture) and
evaluation_<protocol>.json (the summary) into --output.
"""

import argparse
import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python evaluations/evaluate.py`

from dataset_RGB import DATASETS, known_dataset, match_by_name
from evaluations.metrics import PROTOCOLS, other_conventions, psnr_ssim
from utils.environment import software
from utils.errors import UserError, listed, reports_errors
from utils.files import write_csv, write_json
from utils.images import find_pictures

COLUMNS = ("psnr", "ssim", "psnr_y_unrounded", "psnr_rgb", "ssim_rgb")
WORST = 10


def clean_folder(root):
    """Where a data set keeps its clean test pictures: root/test/target, root/target or root itself."""
    return next((folder for folder in (Path(root, "test/target"), Path(root, "target")) if folder.is_dir()), Path(root))


def pair_results(results, targets):
    """Pairs derained with clean pictures by name -> list of dataset_RGB.Pair, list of sentences on what has no partner.

    Where rainy pictures lie in input/ beside target/, each of them must have its result. One folder may hold both: N_DR
    is then the derained picture of N_GT, as in the MATLAB scripts for DID-Data and DDN-Data.
    """
    (results, results_root), (targets, targets_root) = find_pictures(results), find_pictures(clean_folder(targets))
    if results_root.resolve() == targets_root.resolve():
        results = [path for path in results if path.stem.endswith("_DR")]
        targets = [path for path in targets if path.stem.endswith("_GT")]
        if not results or not targets:
            raise UserError(
                f"{results_root} was given as results and as targets: that needs pictures named N_DR and N_GT."
            )
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
            problems.append(
                f"{target} has {found[target]} derained pictures in {results_root}, but {wanted[target]} rainy ones"
            )
    return pairs, problems


def measure(pair, protocol, all_columns):
    """-> list of values, (PSNR, SSIM) or all COLUMNS. Raises UserError if the two cannot be read or compared."""
    result, target = pair.read()
    others = other_conventions(result, target).values() if all_columns else ()
    return [*psnr_ssim(result, target, protocol), *others]


def measure_pairs(pairs, protocol, all_columns=False):
    """-> list of (path of the result, values) in the order of `pairs`, list of sentences on what cannot be measured."""

    def attempt(pair):
        try:
            return measure(pair, protocol, all_columns), None
        except UserError as error:
            return None, str(error)

    with ThreadPoolExecutor() as pool:  # decoding and filtering leave the interpreter free
        outcomes = list(tqdm(pool.map(attempt, pairs), total=len(pairs), unit="picture", disable=None, leave=False))
    rows = [(pair.input, values) for pair, (values, _) in zip(pairs, outcomes) if values]
    return rows, [problem for _, problem in outcomes if problem]


def count_problem(count, dataset):
    """-> list of a sentence if this is not the number of pictures that a known data set has."""
    if dataset is None or count == DATASETS[dataset].test_pairs:
        return []
    return [f"{count} pictures were measured, {dataset} has {DATASETS[dataset].test_pairs}"]


def of_expected(count, dataset):
    """-> "198 of the 200 pictures of Rain200L"."""
    if dataset is None:
        return f"{count} pictures (of no known data set, name it with --dataset)"
    return f"{count} of the {DATASETS[dataset].test_pairs} pictures of {dataset}"


def finite(value):
    return float(value) if math.isfinite(value) else None


def summarise(rows, protocol, dataset):
    """-> dict of means, standard deviations and the worst pictures; what is infinite or undefined is None."""
    values = np.array([values for _, values in rows])
    with np.errstate(invalid="ignore"):  # infinite PSNR has no standard deviation
        statistics = {"mean": values.mean(axis=0), "standard_deviation": values.std(axis=0)}
    return {
        "protocol": protocol,
        "dataset": dataset,
        "pictures": len(rows),
        "expected_pictures": DATASETS[dataset].test_pairs if dataset else None,
        "identical_pictures": int(np.isinf(values[:, 0]).sum()),
        **{name: dict(zip(COLUMNS, map(finite, numbers))) for name, numbers in statistics.items()},
        "worst": [
            {"picture": name, **dict(zip(COLUMNS, map(finite, values)))}
            for name, values in sorted(rows, key=lambda row: row[1][0])[:WORST]
        ],
        "software": software(),
    }


def print_summary(rows, summary):
    values = np.array([values for _, values in rows])
    width = max(20, *(len(worst["picture"]) for worst in summary["worst"]))
    line = "{:{}}  {:8.4f} {:8.6f}  {:16.4f}  {:8.4f} {:8.6f}"
    print(f"{'':{width}}  {'psnr':>8} {'ssim':>8}  psnr_y_unrounded  psnr_rgb ssim_rgb")
    print(line.format("mean", width, *values.mean(axis=0)))
    with np.errstate(invalid="ignore"):
        print(line.format("standard deviation", width, *values.std(axis=0)))
    by_psnr = sorted(rows, key=lambda row: row[1][0])
    print(f"the worst {min(WORST, len(rows))}:")
    for name, numbers in by_psnr[:WORST]:
        print(line.format(name, width, *numbers))
    print(f"{of_expected(len(rows), summary['dataset'])}, protocol {summary['protocol']}")
    if summary["identical_pictures"]:
        print(f"identical to their clean pictures: {summary['identical_pictures']}. Are these results?")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="derained pictures")
    parser.add_argument("--targets", required=True, help="clean pictures, or a data set's folder with them in target/")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: the paper's for the data set")
    parser.add_argument(
        "--dataset", choices=DATASETS, help="whose number of pictures to expect (default: as the folders' names say)"
    )
    parser.add_argument("--output", type=Path, help="where the two files go (default: the folder of the results)")
    parser.add_argument("--go_on", action="store_true", help="average over what is there when pictures are missing")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or known_dataset(args.targets) or known_dataset(args.results)
    if not args.protocol and not args.dataset:
        parser.error("--protocol rain200 or --protocol did: the folders' names do not say which data set this is")
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
        hint = f" To average over {of_expected(len(rows), args.dataset)} all the same, say --go_on." if rows else ""
        raise UserError(f"the results are not complete:{listed(problems, 20)}\nMend that.{hint}")
    summary = {**summarise(rows, args.protocol, args.dataset), "left_out": problems}
    print_summary(rows, summary)
    if problems:
        print(f"left out:{listed(problems, 20)}")
    folder = args.output or root
    write_csv(folder / f"evaluation_{args.protocol}.csv", ("picture", *COLUMNS), [(name, *v) for name, v in rows])
    write_json(folder / f"evaluation_{args.protocol}.json", summary)


if __name__ == "__main__":
    main()
