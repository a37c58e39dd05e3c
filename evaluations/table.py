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

    @property
    def is_complete(self):
        return self.ours is not None and self.ours.pictures == DATASETS[self.dataset].test_pairs


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


def as_markdown(rows, missing):
    """-> text with a section for each data set, and one about what is missing."""
    forms = ("{:.2f}", "{:.2f}", "{:+.2f}", "{:.4f}", "{:.4f}", "{:+.4f}")
    lines = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        lines += [
            f"### {dataset}, protocol `{DATASETS[dataset].protocol}`",
            "",
            "| method | PSNR | paper | difference | SSIM | paper | difference | pictures |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row.dataset == dataset:
                cells = ["–" if v is None else form.format(v) for form, v in zip(forms, row.numbers())]
                count = (
                    f"{row.ours.pictures} of {DATASETS[dataset].test_pairs}" if row.ours else "only the paper's number"
                )
                lines.append(f"| {row.method} | {' | '.join(cells)} | {count} |")
        lines.append("")
    lines.append("Made with " + ", ".join(f"{name} {version}" for name, version in software().items()) + ".")
    if missing:
        lines += ["", "### Missing", "", *("- " + entry.replace("\n", "\n  ") for entry in missing)]
    return "\n".join(lines) + "\n"


def as_latex(rows):
    """-> a tabular for papers (package booktabs), a line for each method and two columns for each data set."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    by_method = {}
    for row in rows:
        by_method.setdefault(row.method, {})[row.dataset] = row

    def cells(row):
        score = row and (row.ours or row.paper)
        if not score:
            return ["--", "--"]
        mark = "" if row.is_complete else r"\textsuperscript{\ddag}" if row.ours else r"\textsuperscript{\dag}"
        return [f"{score.psnr:.2f}{mark}", f"{score.ssim:.4f}{mark}"]

    lines = [
        r"\begin{tabular}{l" + "cc" * len(datasets) + "}",
        r"\toprule",
        " & ".join(["Method", *(rf"\multicolumn{{2}}{{c}}{{{name}}}" for name in datasets)]) + r" \\",
        " & ".join(["", *["PSNR & SSIM"] * len(datasets)]) + r" \\",
        r"\midrule",
        *(
            " & ".join([escape(method), *(cell for name in datasets for cell in cells(found.get(name)))]) + r" \\"
            for method, found in by_method.items()
        ),
        r"\bottomrule",
        r"\end{tabular}",
        r"% \dag: the paper's number, not measured here. \ddag: measured on fewer or more pictures than published.",
    ]
    return "\n".join(lines) + "\n"


def escape(text):
    return "".join("\\" + character if character in "_&%#$" else character for character in text)
