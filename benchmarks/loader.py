"""The loader against the training step: patches per second from pairs and from synthetic rain, by one worker process,
and what the step takes.

python -m benchmarks.loader               # how many workers keep a step waiting for nothing
"""

import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from skimage import data
from torch.utils.data import DataLoader

from benchmarks.common import parse_args, report
from benchmarks.training import Step
from dataset_RGB import Pair, Photo, TrainingPatches, quiet_worker
from tests.golden import golden_network
from utils.images import write_png

HEIGHT, WIDTH = 321, 481
SIZES = ((4, 64), (4, 128), (4, 256))  # batch, patch; on a CPU the first two


def patches_per_second(samples, patch, seconds=5):
    """What one worker delivers, its start not counted."""
    dataset = TrainingPatches(samples * 1000, patch, seed=0)
    loader = iter(DataLoader(dataset, batch_size=4, num_workers=1, worker_init_fn=quiet_worker))
    for _ in range(5):
        next(loader)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(loader)["name"])
    return count / (time.perf_counter() - start)


def step_seconds(name, batch, patch, device, repeats):
    net = golden_network(name).to(device, memory_format=torch.channels_last)
    step, seconds = Step(net, batch, patch, bf16=True), []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()  # ends with the loss on the CPU
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main():
    args = parse_args(__doc__, ("nerd_rain_s",), repeats=5)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clean, rainy = Path(folder, "clean.png"), Path(folder, "rainy.png")
        photograph = data.astronaut()[:HEIGHT, :WIDTH]
        write_png(clean, photograph)
        write_png(
            rainy, np.maximum(photograph, np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 1), np.uint8))
        )
        for name in args.networks:
            for batch, patch in SIZES if args.device.type == "cuda" else SIZES[:2]:
                step = batch / step_seconds(name, batch, patch, args.device, args.repeats)
                pairs, photos = (patches_per_second([sample], patch) for sample in (Pair(rainy, clean), Photo(clean)))
                rows.append(
                    {
                        "network": name,
                        "batch × patch": f"{batch} × {patch}²",
                        "step, pictures per second": step,
                        "one worker, pairs": pairs,
                        "one worker, synthetic rain": photos,
                        "workers needed": math.ceil(step / min(pairs, photos)),
                    }
                )
    report("loader", rows, args.device, repeats=args.repeats, precision="bfloat16")


if __name__ == "__main__":
    main()
