"""The paper's Table 1 with our numbers: what the paper says, and how the table is written."""

import csv
from pathlib import Path
from typing import NamedTuple

from dataset_RGB import DATASETS
from utils.environment import software

HERE = Path(__file__).resolve().parent
SETS = ("Rain200L", "Rain200H", "DID-Data", "DDN-Data", "SPA-Data")
COLUMNS = (
    *("dataset", "protocol", "method", "psnr", "paper_psnr", "psnr_difference"),
    *("ssim", "paper_ssim", "ssim_difference", "pictures", "expected_pictures"),
)

HEADER = ("method", "PSNR", "paper", "difference", "SSIM", "paper", "difference", "pictures")
PAPER_ONLY = "only the paper's number"


class Score(NamedTuple):
    """Mean PSNR in dB and SSIM, and over how many pictures (None: the paper does not say)."""

    psnr: float
    ssim: float
    pictures: int | None = None


class Row(NamedTuple):
    """One method on one data set; a Score is None where there is no number."""

    dataset: str
    method: str
    ours: Score | None
    paper: Score | None

    def numbers(self):
        """-> PSNR, the paper's, their difference, SSIM, the paper's, their difference."""
        values = []
        for name in ("psnr", "ssim"):
            pair = [getattr(score, name) if score else None for score in (self.ours, self.paper)]
            values += [*pair, pair[0] - pair[1] if None not in pair else None]
        return values

    def cells(self):
        """-> the row's cells after the method's name, as text: `numbers` rounded, and over how many pictures."""
        forms = ("{:.2f}", "{:.2f}", "{:+.2f}", "{:.4f}", "{:.4f}", "{:+.4f}")
        numbers = ["–" if v is None else form.format(v) for form, v in zip(forms, self.numbers())]
        return [*numbers, f"{self.ours.pictures} of {DATASETS[self.dataset].test_pairs}" if self.ours else PAPER_ONLY]


def read_facts(name):
    """The rows of one of the CSV files in this folder -> list of dicts."""
    with open(HERE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_scores():
    """Table 1 of the paper -> dict of (data set, method) -> Score, in the table's order."""
    rows = read_facts("paper_table1.csv")
    return {
        (dataset, row["method"]): Score(float(row[f"{dataset}_psnr"]), float(row[f"{dataset}_ssim"]))
        for dataset in SETS
        for row in rows
    }


def as_csv(rows):
    """-> list of rows in the order of COLUMNS."""
    return [
        [row.dataset, DATASETS[row.dataset].protocol, row.method, *row.numbers()]
        + [row.ours.pictures if row.ours else None, DATASETS[row.dataset].test_pairs]
        for row in rows
    ]


def by_dataset(rows):
    """-> dict of data set -> its rows."""
    return {
        dataset: [row for row in rows if row.dataset == dataset] for dataset in dict.fromkeys(r.dataset for r in rows)
    }


def as_markdown(rows, missing=(), more=()):
    """-> text with a section for each data set, about what is missing, and about what could be measured, too."""
    lines = []
    for dataset, section in by_dataset(rows).items():
        lines += [f"### {dataset}, protocol `{DATASETS[dataset].protocol}`", "", f"| {' | '.join(HEADER)} |"]
        lines += ["|" + "---|" * len(HEADER), *(f"| {row.method} | {' | '.join(row.cells())} |" for row in section), ""]
    lines.append("Made with " + ", ".join(f"{name} {version}" for name, version in software().items()) + ".")
    for title, entries in (("Missing", missing), ("Could be measured, too", more)):
        if entries:
            lines += ["", f"### {title}", "", *("- " + entry.replace("\n", "\n  ") for entry in entries)]
    return "\n".join(lines) + "\n"


def as_latex(rows):
    """-> a tabular for papers (package booktabs) with a part for each data set."""
    lines = [r"\begin{tabular}{lccccccc}", r"\toprule", " & ".join(HEADER) + r" \\"]
    for dataset, section in by_dataset(rows).items():
        lines += [r"\midrule", rf"\multicolumn{{8}}{{c}}{{{dataset} ({DATASETS[dataset].protocol})}} \\", r"\midrule"]
        lines += [
            " & ".join([escape(row.method), *(c.replace("–", "--") for c in row.cells())]) + r" \\" for row in section
        ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape(text):
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c) or (f"\\{c}" if c in "_&%#${}" else c) for c in text)
