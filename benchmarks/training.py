"""A training step (forward, losses, backward, Adam): ours against the published formulation; and what one worker of the
loader delivers.

python -m benchmarks.training
"""

import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks import common
from benchmarks.published import published
from dataset_RGB import Photo, TrainingPatches, ignore_signals
from losses import DerainLoss
from utils.files import UserError, reports_errors
from utils.pairs import find_pairs

SIZES = ((1, 64), (4, 64), (1, 128))  # batch, patch
LOADING_BATCHES = 10
DEMO = Path(__file__).parent.parent / "Datasets" / "demo" / "train"


class Steps:
    """Some optimizer steps on always the same batch, B×3×patch×patch, whose first picture is the same at any B."""

    def __init__(self, net, batch, patch, count, bf16=False, compile=False, fused=True):
        self.net = torch.compile(net, dynamic=False) if compile else net
        self.count, self.bf16, self.losses = count, bf16, []
        self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=fused)
        rng = torch.Generator().manual_seed(0)
        pictures = [torch.rand(2, 3, patch, patch, generator=rng) for _ in range(batch)]
        self.rainy, self.clean = torch.stack(pictures, dim=1).to(next(net.parameters()).device)
        self.loss = DerainLoss().to(self.rainy.device)

    def __call__(self):
        """-> the first picture of the first step's result, on the CPU."""
        results = []
        for _ in range(self.count):
            with torch.autocast(self.rainy.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.net(self.rainy)
            total = self.loss(outputs, self.clean)["total"]
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(total.detach())
            results.append(outputs[0][0].detach())
        return results[0].float().cpu()  # waits for a GPU's other steps, too


def compare(name, args, batch, patch, variants=common.EAGER):
    """-> rows of the table for one network and size. With larger batches, the baseline also runs with single pictures,
    as published: its batch may not fit."""
    count = max(3, 20 // batch) if args.device.type == "cuda" else 1  # steps in a round

    def baseline(batch):
        return Steps(published(common.make_network(name, args)), batch, patch, count, fused=False), batch * count

    def ours(options):
        net = common.make_network(name, args).to(memory_format=torch.channels_last)
        steps = Steps(net, batch, patch, count, **options)
        steps.rainy = steps.rainy.contiguous(memory_format=torch.channels_last)
        return steps, batch * count

    builders = {f"{common.BASELINE}, batch {size}": partial(baseline, size) for size in dict.fromkeys((batch, 1))}
    builders |= {variant: partial(ours, common.VARIANTS[variant]) for variant in variants}
    runs = common.run_rounds(builders, args)
    losses = [run.function.losses[2].item() for run in runs.values() if len(run.function.rainy) == batch]
    if max(losses) > 1.005 * min(losses):  # a step lowers them by more
        raise UserError(f"the variants of {name} learn different things: their losses in step 3 are {losses}.")
    return common.as_rows(runs, network=name, task=f"training {batch} × {patch}²")


def loader_rows(patch):
    """-> rows of the patches a second that one worker delivers from the demo's pairs, and from its clean photographs
    with synthetic rain."""
    pairs, rows = find_pairs(DEMO), []
    for source, samples in {"pairs": pairs, "synthetic rain": [Photo(pair.target) for pair in pairs]}.items():
        patches = TrainingPatches((samples * 8)[: 8 * (LOADING_BATCHES + 2)], patch, seed=0)
        batches = iter(DataLoader(patches, batch_size=8, num_workers=1, worker_init_fn=ignore_signals))
        for _ in range(2):  # the worker's start
            next(batches)
        start = time.perf_counter()
        count = sum(len(batch["input"]) for batch in batches)
        rows.append({"source": source, "patch": patch, "patches a second": count / (time.perf_counter() - start)})
    return rows


@reports_errors
def main(argv=None):
    args = common.parse_args(__doc__, argv)
    sizes = ((1, 32),) if args.quick else SIZES
    rows = [row for size in sizes for row in compare("NeRD-Rain-S", args, *size)]
    loading = loader_rows(sizes[-1][1])
    common.report("training", rows, args, loader=loading)
    print(common.as_markdown(loading))


if __name__ == "__main__":
    main()
