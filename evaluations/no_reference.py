"""Quality of derained real photographs, which have no clean pictures: NIQE and BRISQUE, lower is better.

python evaluations/no_reference.py --results results/photos

Needs pyiqa (pip install pyiqa), which fetches the metrics' parameters at its first use. Writes no_reference.csv.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python evaluations/no_reference.py`

from utils.devices import add_gpus, choose_device
from utils.errors import UserError, listed, reports_errors
from utils.files import write_csv
from utils.images import find_pictures, read_image, to_tensor

METRICS = ("niqe", "brisque")


def load_metrics(device):
    try:
        import pyiqa
    except ImportError:
        raise UserError("NIQE and BRISQUE need pyiqa: pip install pyiqa.") from None
    try:
        return [pyiqa.create_metric(name, device=device) for name in METRICS]
    except OSError as error:  # URLError and its kin
        raise UserError(f"pyiqa could not fetch the parameters of {' and '.join(METRICS)} ({error}).") from error


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="derained pictures")
    parser.add_argument("--output", type=Path, help="where the table goes (default: the folder of the results)")
    add_gpus(parser)
    args = parser.parse_args(argv)
    paths, root = find_pictures(args.results)
    device = choose_device(args.gpus)
    metrics = load_metrics(device)
    rows, problems = [], []
    for path in tqdm(paths, unit="picture", disable=None):
        try:
            picture = to_tensor(read_image(path))[None].to(device)
            rows.append((str(path.relative_to(root)), *(float(metric(picture)) for metric in metrics)))
        except (UserError, AssertionError, RuntimeError) as error:  # the metrics refuse small pictures
            problems.append(f"{path}: {error}")
    width = max([12, *(len(row[0]) for row in rows)])
    print(f"{'':{width}}  {'NIQE':>8} {'BRISQUE':>8}")
    for name, *values in [*rows, *([("mean", *np.mean([row[1:] for row in rows], axis=0))] if rows else [])]:
        print("{:{}}  {:8.4f} {:8.4f}".format(name, width, *values))
    print(f"{len(rows)} of {len(paths)} pictures")
    write_csv((args.output or root) / "no_reference.csv", ("picture", *METRICS), rows)
    if problems:
        raise UserError(f"{len(problems)} pictures could not be measured:{listed(problems, 20)}")


if __name__ == "__main__":
    main()
