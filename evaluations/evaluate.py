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
from utils.pairs import DATASETS, clean_folder, known_dataset, match_by_name
from utils.pictures import find_pictures

COLUMNS = ("psnr", "ssim", "psnr_y_unrounded", "psnr_rgb", "ssim_rgb")
WORST = 10


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
    inputs_root = targets_root.parent / "input"
    if targets_root.name == "target" and inputs_root.is_dir():
        inputs = find_pictures(inputs_root)[0]
        wanted |= Counter(pair.target for pair in match_by_name(inputs, targets, inputs_root, targets_root)[0])
    for target, number in wanted.items():
        if found[target] < number:
            derained = counted(found[target], "derained picture")
            problems.append(f"{target} has {derained} in {results_root} where {number} should be")
    return pairs, problems


def of_expected(count, dataset):
    """-> such as "198 of the 200 pictures of Rain200L"."""
    if dataset is None:
        return f"{counted(count, 'picture')} (unknown data set: name it with --dataset)"
    return f"{count} of the {DATASETS[dataset].test_pairs} pictures of {dataset}"


def measure(results, targets, scores, dataset=None):
    """Measures the derained pictures in `results` against the clean ones in `targets`.

    Returns a list of (path below `results`, what scores(result, target) returns), and a list of sentences on pictures
    that are missing, superfluous or broken, and on a number of pictures that is not the data set's.
    """
    pairs, problems = pair_results(results, targets)

    def measure_pair(pair):
        try:
            result, target = pair.read()
        except UserError as error:
            return error
        return scores(result, target)

    with ThreadPoolExecutor() as pool:  # decoding and filtering release the interpreter's lock
        outcomes = pool.map(measure_pair, pairs)
        outcomes = list(tqdm(outcomes, total=len(pairs), unit="picture", disable=None, leave=False))
    rows, root = [], find_pictures(results)[1]
    for pair, outcome in zip(pairs, outcomes):
        if isinstance(outcome, UserError):
            problems.append(str(outcome))
        else:
            rows.append((str(pair.input.relative_to(root)), outcome))
    if dataset and len(rows) != DATASETS[dataset].test_pairs:
        problems.append(f"{of_expected(len(rows), dataset)} can be measured")
    return rows, problems


def summarise(rows):
    """Prints the mean, the standard deviation and the worst of rows with values of COLUMNS -> dict of the same."""
    values = np.array([values for _, values in rows])
    with np.errstate(invalid="ignore"):  # infinite PSNR has no standard deviation
        spread = {"mean": values.mean(axis=0), "standard deviation": values.std(axis=0)}
    worst = dict(sorted(rows, key=lambda row: row[1][0])[:WORST])
    width = max(map(len, [*spread, *worst]))
    print(" " * width, *(f"{name:>16}" for name in COLUMNS))
    for title, numbers in {**spread, **worst}.items():
        print(f"{title:{width}}", *(f"{number:16.6f}" for number in numbers))

    def named(numbers):  # JSON knows neither infinity nor NaN
        return {name: float(number) if math.isfinite(number) else None for name, number in zip(COLUMNS, numbers)}

    return {
        "pictures": len(rows),
        "mean": named(spread["mean"]),
        "standard_deviation": named(spread["standard deviation"]),
        "worst": [{"picture": name, **named(numbers)} for name, numbers in worst.items()],
    }


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
        parser.error("the folder names match no known data set: give --protocol rain200 or --protocol did")
    args.protocol = args.protocol or DATASETS[args.dataset].protocol
    return args


@reports_errors
def main(argv=None):
    args = parse_args(argv)

    def scores(result, target):
        return [*psnr_ssim(result, target, args.protocol), *other_conventions(result, target).values()]

    rows, problems = measure(args.results, args.targets, scores, args.dataset)
    average = of_expected(len(rows), args.dataset)
    if problems and not (rows and args.go_on):
        hint = f"\n--go_on averages over {average} all the same." if rows else ""
        raise UserError(f"the results are not complete:{listed(problems)}{hint}")
    facts = {"protocol": args.protocol, "dataset": args.dataset, "left_out": problems, "software": software()}
    summary = {**summarise(rows), **facts}
    print(f"{average}, protocol {args.protocol}")
    if problems:
        print(f"left out:{listed(problems)}")
    folder = args.output or find_pictures(args.results)[1]
    write_csv(folder / f"evaluation_{args.protocol}.csv", ("picture", *COLUMNS), [(name, *v) for name, v in rows])
    write_json(folder / f"evaluation_{args.protocol}.json", summary)


if __name__ == "__main__":
    main()
