"""A training step (forward, losses, backward, Adam): ours against the published formulation; and what one worker of the
loader delivers meanwhile.

python -m benchmarks.training
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from skimage import data
from torch.utils.data import DataLoader

from benchmarks.common import (
    BASELINE,
    EAGER,
    VARIANTS,
    as_markdown,
    as_rows,
    make_network,
    parse_args,
    report,
    run_rounds,
)
from benchmarks.published import published
from dataset_RGB import Photo, TrainingPatches, quiet_worker
from losses import DerainLoss
from utils.files import UserError
from utils.pairs import Pair
from utils.pictures import write_png
from utils.rain import add_rain

SIZES = ((1, 64), (4, 64), (1, 128))  # batch, patch; on a CPU
LOADING_BATCHES = 10


class Steps:
    """Some optimizer steps on always the same batch -> the first image of the first step's result."""

    def __init__(self, net, batch, patch, count, bf16=False, fused=True, compile=False):
        device = next(net.parameters()).device
        self.net = torch.compile(net, dynamic=False) if compile else net
        self.count, self.bf16, self.losses = count, bf16, []
        self.loss = DerainLoss().to(device)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=fused)
        rng = torch.Generator().manual_seed(0)
        pictures = [torch.rand(2, 3, patch, patch, generator=rng) for _ in range(batch)]
        self.rainy, self.clean = torch.stack(pictures, dim=1).to(device)

    def __call__(self):
        for _ in range(self.count):
            with torch.autocast(self.rainy.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.net(self.rainy)
            total = self.loss(outputs, self.clean)["total"]
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(total.detach())
            if len(self.losses) == 1:
                first = outputs[0][:1].detach().float().cpu()
        return first if len(self.losses) == self.count else None


def compare(name, args, batch, patch, variants=EAGER):
    """-> rows of the table for one network and size."""
    gpu = args.device.type == "cuda"
    count = max(3, 20 // batch) if gpu else 3  # steps in a round

    def baseline(batch):
        return Steps(published(make_network(name, args.quick)).to(args.device), batch, patch, count, fused=False)

    def ours(options):
        net = make_network(name, args.quick).to(args.device, memory_format=torch.channels_last)
        steps = Steps(net, batch, patch, count, **options)
        steps.rainy = steps.rainy.contiguous(memory_format=torch.channels_last)
        return steps

    factories = {BASELINE: partial(baseline, batch)}
    if gpu and batch > 1:  # in case that its batch does not fit
        factories[f"{BASELINE}, batch 1"] = partial(baseline, 1)
    factories |= {variant: partial(ours, VARIANTS[variant]) for variant in variants}
    runs = run_rounds(factories, args.rounds, args.device)
    losses = [run.function.losses[2].item() for run in runs.values() if len(run.function.rainy) == batch]
    if max(losses) > 1.05 * min(losses):
        raise UserError(f"the variants of {name} learn different things: their losses in step 3 are {losses}.")
    pictures = {variant: count * len(run.function.rainy) for variant, run in runs.items()}
    return as_rows(runs, pictures, network=name, task=f"training {batch} × {patch}²")


def loader_rows(args, patch):
    """-> rows of the patches a second that one worker delivers from pairs, and from photographs with synthetic rain."""
    photograph = data.astronaut()[:321, :481]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clean, rainy = Path(folder, "clean.png"), Path(folder, "rainy.png")
        write_png(clean, photograph)
        write_png(rainy, add_rain(photograph, np.random.default_rng(0)))
        for source, sample in {"pairs": Pair(rainy, clean), "synthetic rain": Photo(clean)}.items():
            patches = TrainingPatches([sample] * 8 * (LOADING_BATCHES + 2), patch, seed=0)
            batches = iter(DataLoader(patches, batch_size=8, num_workers=1, worker_init_fn=quiet_worker))
            for _ in range(2):  # the worker's start
                next(batches)
            start = time.perf_counter()
            count = sum(len(batch["input"]) for batch in batches)
            rows.append({"source": source, "patch": patch, "patches a second": count / (time.perf_counter() - start)})
    return rows


def main(argv=None):
    args = parse_args(__doc__, argv, networks=("NeRD-Rain-S",))
    sizes = ((1, 32),) if args.quick else ((1, 256),) if args.device.type == "cuda" else SIZES
    rows = [row for name in args.networks for size in sizes for row in compare(name, args, *size)]
    loading = loader_rows(args, sizes[-1][1])
    report("training", rows, args, loader=loading)
    print(as_markdown(loading))


if __name__ == "__main__":
    main()
