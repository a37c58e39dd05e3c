"""What the benchmarks share: variants run alternately in one process, with the same settings of cuDNN."""

import argparse
import contextlib
import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ablations import NETWORKS, build
from evaluations.metrics import psnr
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.devices import M_MMAP_MAX, M_TRIM_THRESHOLD, add_gpus, choose_device, keep_freed_memory
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


def parse_args(description, argv=None):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_gpus(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny network and tiny pictures, to try the command")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    args = parser.parse_args(argv)
    args.device, args.rounds = choose_device(args.gpus), 1 if args.quick else 5
    torch.backends.cudnn.benchmark = True  # for both sides
    return args


def make_network(name, args):
    """-> a network with this repository's weights, or with random ones if it has none."""
    torch.manual_seed(0)
    if name == "NeRD-Rain-S" and not args.quick:
        return load_network(OWN_WEIGHTS).to(args.device)
    return build(**(TINY if args.quick else NETWORKS[name])).to(args.device)


def default_memory():
    """Makes glibc return freed memory again, as it does for the published code: undoes keep_freed_memory."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # to which it rises with the network's tensors
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


class Run(NamedTuple):
    """How a variant ran."""

    function: Callable
    pictures: int  # that it computes
    output: torch.Tensor  # what it returned at first, on the CPU
    memory: float | None  # peak on a GPU with the weights, MiB
    seconds: list  # of each round


def run_rounds(variants, args):
    """Builds variants and runs them alternately -> dict of name -> Run, without those that do not fit into memory.

    Args:
        variants: dict of name -> function that builds a variant -> (function without arguments, pictures it computes)

    A first time warms up. On a CPU each runs twice in a round, of which the second time counts.
    """
    gpu, runs = args.device.type == "cuda", {}
    for name, build_variant in variants.items():
        if gpu:  # reserved memory counts that of CUDA graphs, too
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(args.device)
        try:
            function, pictures = build_variant()
            output = function()
            if gpu:  # the first time also held what compiling and cuDNN's search needed
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(args.device)
                function()
        except torch.OutOfMemoryError:
            print(f"{name} does not fit into the GPU's memory")
            continue
        memory = (torch.cuda.max_memory_reserved(args.device) - before) / 2**20 if gpu else None
        runs[name] = Run(function, pictures, output, memory, [])
    for _ in range(args.rounds):
        for name, run in runs.items():
            if not gpu:
                default_memory() if name.startswith(BASELINE) else keep_freed_memory()
                run.function()  # memory settles
            start = time.perf_counter()
            run.function()
            run.seconds.append(time.perf_counter() - start)
    return runs


def as_rows(runs, **labels):
    """-> rows of a table: labels, speed, its ratio to the first run's in the same round, likeness, memory."""
    baseline_name, baseline = next(iter(runs.items()))
    baseline_rates = [baseline.pictures / seconds for seconds in baseline.seconds]
    rows = []
    for name, run in runs.items():
        rates = [run.pictures / seconds for seconds in run.seconds]
        likeness = min(psnr(float(((run.output - baseline.output) ** 2).mean()), 1), 200.0)
        if likeness < LEAST_PSNR:
            raise UserError(f"{name} computes something else than {baseline_name}: {likeness:.1f} dB between outputs.")
        ratios = [rate / baseline_rate for rate, baseline_rate in zip(rates, baseline_rates)]
        row = {**labels, "variant": name, "pictures a second": spread(rates), "times as fast": spread(ratios)}
        rows.append({**row, "PSNR between outputs": likeness, "GPU memory (MiB)": run.memory})
    return rows


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


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
    gpu, cpus = args.device.type == "cuda", Path("/proc/cpuinfo")  # which names the processor, on Linux
    names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else []
    machine = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(args.device) if gpu else None,
    }
    facts = {**machine, **software(), "rounds": args.rounds, **facts}
    path = args.output / f"{name}_{'gpu' if gpu else 'cpu'}.json"
    write_json(path, {"rows": rows, "facts": facts})
    print(as_markdown(rows))
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    print(f"written to {path}", flush=True)
