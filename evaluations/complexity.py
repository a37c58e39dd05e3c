"""Parameters, multiply-adds, time and peak memory of the networks for one 256×256 picture, as papers' tables list them.

python -m evaluations.complexity

Time is the median of five pictures after a warm-up; memory is what a picture needs above the weights.
"""

import argparse
import re
import statistics
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ablations import NETWORKS, build
from utils.derain import Derainer
from utils.devices import add_gpus, choose_device
from utils.files import reports_errors

SIDE, REPEATS = 256, 5


def size_of(options):
    """-> numbers of parameters and of multiply-adds of ablations.build(**options) for one picture."""
    with torch.device("meta"):  # counts from shapes alone
        net, picture = build(**options).eval(), torch.empty(1, 3, SIDE, SIDE)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            net(picture)
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2


def peak_memory(device):
    """-> the most memory in MiB that this process has held: on the GPU, or in all (NaN if not on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10 if status.exists() else float("nan")


def measure(options, gpus):
    """-> median seconds and MiB of one picture, and what computed it."""
    device = choose_device(gpus)
    derainer = Derainer(build(**options).to(device), mode="window")
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    weights = peak_memory(device)
    derainer(picture)
    memory = peak_memory(device) - weights
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        derainer(picture)  # ends with the result on the CPU
        seconds.append(time.perf_counter() - start)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return statistics.median(seconds), memory, gpu or f"CPU, {torch.get_num_threads()} threads"


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_gpus(parser)
    args = parser.parse_args(argv)
    print("| network | parameters (M) | multiply-adds (G) | seconds | memory (MiB) |\n|---|---|---|---|---|")
    for name, options in NETWORKS.items():
        parameters, multiply_adds = size_of(options)
        with get_context("spawn").Pool(1) as pool:  # a new process, as peak memory never falls
            seconds, memory, computer = pool.apply(measure, (options, args.gpus))
        numbers = f"{parameters / 1e6:.2f} | {multiply_adds / 1e9:.2f} | {seconds:.3f} | {memory:.0f}"
        print(f"| {name} | {numbers} |")
    print(f"one {SIDE}×{SIDE} picture, float32, {computer}, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
