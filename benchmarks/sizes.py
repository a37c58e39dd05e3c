"""Deraining pictures of growing size: time and memory must grow no faster than their pixels.

python -m benchmarks.sizes                # 0.25, 1, 4 and 16 megapixels
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

import model
from benchmarks.common import parse_args, report
from evaluations.complexity import peak_memory
from utils.devices import choose_device
from utils.inference import Derainer

SIDES = (512, 1024, 2048, 4096)


def derain_once(network, side, gpus):
    """-> seconds, MiB above the weights; in a process of its own, as peak memory never falls."""
    device = choose_device(gpus)
    derain = Derainer(getattr(model, network)().to(device), mode="window")
    weights = peak_memory(device)
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    derain(picture[:256, :256])
    start = time.perf_counter()
    derain(picture)
    return time.perf_counter() - start, peak_memory(device) - weights


def main():
    args = parse_args(__doc__, networks=("nerd_rain_s",))
    rows = []
    for network in args.networks:
        for side in SIDES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # peak memory never falls again
                seconds, memory = pool.submit(derain_once, network, side, args.gpus).result()
            megapixels = side * side / 2**20
            rows.append(
                {
                    "network": network,
                    "megapixels": megapixels,
                    "seconds": seconds,
                    "seconds per megapixel": seconds / megapixels,
                    "memory in MiB": memory,
                }
            )
            print(rows[-1], flush=True)
    report("sizes", rows, args.device)


if __name__ == "__main__":
    main()
