"""What the benchmarks share: they run the variants in turn, in one process, and compare medians."""

import argparse
import contextlib
import ctypes
import statistics
import time
from pathlib import Path

import torch

from utils.devices import M_MMAP_MAX, M_TRIM_THRESHOLD, add_gpus, choose_device, keep_freed_memory
from utils.environment import hardware, software
from utils.files import write_json

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
NETWORKS = ("nerd_rain_s", "nerd_rain")
RESULTS = Path(__file__).parent / "results"


def parse_args(description, networks, repeats=None, compiles=False):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=networks, metavar="NETWORK")
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats)
    if compiles:
        parser.add_argument("--compile", action="store_true", help="also measure torch.compile: minutes more")
    add_gpus(parser)
    args = parser.parse_args()
    args.device = choose_device(args.gpus)
    return args


def give_back_memory():
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to give back
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_memory():
    """Lets glibc treat memory as it does by itself once its thresholds have settled on large tensors."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def by_default(function):
    """Runs a baseline without what utils.devices sets for a CPU."""

    def run():
        reset_memory()
        result = function()
        keep_freed_memory()
        return result

    return run


def seconds_of(variants, repeats, device):
    """Runs the named functions in turn, each twice in a row -> dict of name -> median seconds of the second runs. The
    first ones settle caches and memory, of which none is left over from the function before."""

    def run(function):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            give_back_memory()
            run(function)
            times[name].append(run(function))
    return {name: statistics.median(values) for name, values in times.items()}


def report(name, rows, device, keep=True, **facts):
    """Prints the rows (dicts with the same keys) as a table and writes them with the machine's facts as JSON, unless
    they are not what the README shows."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    facts = {**hardware(device), **software(), **facts}
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    path = RESULTS / f"{name}_{'gpu' if device.type == 'cuda' else 'cpu'}.json"
    if not keep:
        return
    write_json(path, {"rows": rows, "facts": facts})
    print(f"written to {path}")
