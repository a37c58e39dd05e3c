"""What the benchmarks share: variants run alternately in one process, with the same settings of cuDNN."""

import argparse
import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ablations import NETWORKS, build
from evaluations.metrics import psnr
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.devices import M_MMAP_MAX, M_TRIM_THRESHOLD, choose_device, keep_freed_memory
from utils.files import UserError, software, write_json

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RESULTS = Path(__file__).parent / "results"
TINY = {"dim": 8, "num_blocks": (1, 1, 1)}  # of --quick
BASELINE = "published formulation, float32"
VARIANTS = {  # of ours -> options
    "float32": {},
    "bfloat16": {"bf16": True},
    "bfloat16, compiled": {"bf16": True, "compile": True},
}
EAGER = ("float32", "bfloat16")
LEAST_PSNR = 40  # dB between the outputs of two variants, with values in [0, 1]


def parse_args(description, argv=None, networks=()):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if networks:
        parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=networks, metavar="NETWORK")
    parser.add_argument("--rounds", type=int, default=5, help="each runs every variant once (default: %(default)s)")
    parser.add_argument("--device", help="number of the GPU, or cpu (default: a GPU if there is one)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and tiny pictures, to try the command")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    torch.backends.cudnn.benchmark = True  # for both sides
    return args


def make_network(name, quick=False):
    """-> a network with this repository's weights, or with random ones if it has none."""
    torch.manual_seed(0)
    if name == "NeRD-Rain-S" and not quick:
        return load_network(OWN_WEIGHTS)
    return build(**(TINY if quick else NETWORKS[name]))


def default_memory():
    """Undoes what utils.devices sets for CPUs: glibc returns freed memory again, with its thresholds settled on large
    tensors. The published code runs so."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


class Run(NamedTuple):
    """A variant, what its first call returned, its peak GPU memory in MiB, and the seconds of each round."""

    function: Callable
    output: torch.Tensor
    memory: float | None
    seconds: list


def run_rounds(factories, rounds, device):
    """Builds the variants, each a function without arguments, and runs them alternately: `rounds` times after a first
    time to warm up. On a CPU each runs twice in a round, of which the second time counts.

    Memory is counted from before a variant is built, so with its weights. Variants that do not fit into it are omitted.
    Returns a dict of name -> Run.
    """
    runs = {}
    for name, build_variant in factories.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        try:
            function = build_variant()
            output, memory = function(), None
        except torch.OutOfMemoryError:
            print(f"{name} does not fit into the GPU's memory")
            continue
        if device.type == "cuda":
            memory = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        runs[name] = Run(function, output, memory, [])
    for _ in range(rounds):
        for name, run in runs.items():
            if device.type == "cpu":
                default_memory() if name == BASELINE else keep_freed_memory()
                run.function()  # memory settles
            start = time.perf_counter()
            run.function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            run.seconds.append(time.perf_counter() - start)
    return runs


def as_rows(runs, pictures, **labels):
    """-> rows of a table: speed, ratio to the first run in the same round, likeness of its output, memory.

    Args:
        runs: dict of variant -> Run; pictures: of variant -> pictures in a round; labels: columns that come first
    """
    baseline_name, baseline = next(iter(runs.items()))
    rows = []
    for name, run in runs.items():
        rates = [pictures[name] / seconds for seconds in run.seconds]
        baseline_rates = [pictures[baseline_name] / seconds for seconds in baseline.seconds]
        likeness = min(psnr(float(((run.output - baseline.output) ** 2).mean()), 1), 200.0)
        if likeness < LEAST_PSNR:
            raise UserError(f"{name} computes something else than {baseline_name}: {likeness:.1f} dB between outputs.")
        ratios = [rate / baseline_rate for rate, baseline_rate in zip(rates, baseline_rates)]
        row = {"variant": name, "pictures a second": spread(rates), "times as fast": spread(ratios)}
        rows.append({**labels, **row, "PSNR between outputs": likeness, "GPU memory (MiB)": run.memory})
    return rows


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def hardware(device):
    """-> dict of the machine's facts on which times depend."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux has the processor's name only here
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def as_markdown(rows):
    """-> a table of dicts with the same keys; ranges as "median (min to max)"."""

    def cell(value):
        if isinstance(value, dict):
            return f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def report(name, rows, args, **facts):
    """Prints the rows as a table, and writes them with the facts of machine and software to <name>_<device>.json."""
    facts = {**hardware(args.device), **software(), "rounds": args.rounds, **facts}
    path = args.output / f"{name}_{'gpu' if args.device.type == 'cuda' else 'cpu'}.json"
    write_json(path, {"rows": rows, "facts": facts})
    print(as_markdown(rows))
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    print(f"written to {path}", flush=True)
