"""Size and speed of the networks, as papers' tables list them.

python evaluations/complexity.py --size 256 256

Parameters; multiply-adds, time and peak memory of one picture through the test procedure (256×256 windows). Time is
the median after a warm-up; memory is what the picture needs above the weights.
"""

import argparse
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python evaluations/complexity.py`

import model
from utils.checkpoint import network_name
from utils.devices import add_gpus, choose_device
from utils.environment import software
from utils.errors import UserError, reports_errors
from utils.inference import Derainer


def peak_memory(device):
    """The most memory in MiB that this process has held: on the GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage also counts what the process was started from
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def size_of(derain, picture):
    """-> the number of parameters of a Derainer's network, and of multiply-adds for a picture H×W×3."""
    with FlopCounterMode(display=False) as counter:
        derain(picture)
    return sum(parameter.numel() for parameter in derain.net.parameters()), counter.get_total_flops() // 2


def measure(network, height, width, gpus, repeats):
    """-> dict of one network's figures; in a process of its own, as peak memory never falls."""
    device = choose_device(gpus)
    derain = Derainer(getattr(model, network)().to(device), mode="window")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    weights = peak_memory(device)
    derain(picture)  # warms up, before anything else can raise the peak
    memory = peak_memory(device) - weights
    parameters, multiply_adds = size_of(derain, picture)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        derain(picture)  # ends with the picture on the CPU
        seconds.append(time.perf_counter() - start)
    return {
        "network": network_name(derain.net),
        "parameters": parameters,
        "multiply_adds": multiply_adds,
        "seconds": statistics.median(seconds),
        "memory_mib": memory,
    }


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = model.NETWORK_NAMES
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NETWORK")
    parser.add_argument("--size", nargs=2, type=int, default=(256, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    add_gpus(parser)
    args = parser.parse_args(argv)
    if min(*args.size, args.repeats) < 1:
        raise UserError("--size and --repeats must be at least 1.")
    device = choose_device(args.gpus)
    height, width = args.size
    print(f"| network | parameters (M) | multiply-adds (G) | seconds a picture | memory (MiB) |\n|{'---|' * 5}")
    for network in args.networks:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                found = pool.submit(measure, network, height, width, args.gpus, args.repeats).result()
            except (BrokenProcessPool, MemoryError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"{network} could not run at {height}×{width}: {reason} Try a smaller --size."
                ) from error
        print(
            f"| {found['network']} | {found['parameters'] / 1e6:.2f} | {found['multiply_adds'] / 1e9:.2f} | "
            f"{found['seconds']:.3f} | {found['memory_mib']:.0f} |",
            flush=True,
        )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"one {height}×{width} picture on {where}, float32, PyTorch {software()['torch']}, median of {args.repeats}")


if __name__ == "__main__":
    main()
