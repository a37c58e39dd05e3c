"""Deraining pictures of 481×321 by the published windows: ours against the published formulation, which takes one
window after the other; its memory is also measured with as many at once as ours has.

python -m benchmarks.pictures             # pictures per second, ratio, PSNR against the first row's results, memory
"""

import numpy as np
import torch

from benchmarks.common import NETWORKS, by_default, parse_args, report, seconds_of
from evaluations.complexity import peak_memory
from evaluations.metrics import psnr
from tests.golden import golden_network
from tests.yardstick import yardstick
from utils.inference import GPU_BATCH, Derainer

HEIGHT, WIDTH = 321, 481
BASELINE = "published formulation, float32"
LEAST_PSNR = {"float32": 80, "bfloat16": 40}  # dB between pictures of 8 bits, with random weights


def variants_on(name, device):
    """-> dict of variant -> Derainer."""

    def published(batch):
        net = yardstick(golden_network(name).eval().to(device))
        derainer = Derainer(net, mode="window")
        net.to(memory_format=torch.contiguous_format)  # which Derainer changes
        derainer.batch, derainer.forward = batch, lambda x: net(x.contiguous())[0]
        return derainer

    def ours(compiled=False, **options):
        net = golden_network(name).eval().to(device, memory_format=torch.channels_last)
        derainer = Derainer(net, mode="window", **options)
        if compiled:
            derainer.net = torch.compile(net)
        return derainer

    variants = {BASELINE: published(batch=1), "ours, float32": ours(), "ours, bfloat16": ours(bf16=True)}
    if device.type == "cuda":
        variants |= {
            "published formulation, float32, as many windows at once as ours": published(GPU_BATCH),
            "ours, float32, --fused": ours(fused=True),
            "ours, bfloat16, --fused": ours(bf16=True, fused=True),
            "ours, bfloat16, torch.compile": ours(bf16=True, compiled=True),
        }
    return variants


def compare(name, device, repeats, count):
    """-> rows of the table for one network."""
    rng = np.random.default_rng(0)
    pictures = [(i, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for i in range(count)]
    variants = variants_on(name, device)
    results, memory = {}, {}
    for variant, derainer in variants.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        results[variant] = np.stack([result for _, result in derainer.pictures(pictures)]).astype(float)
        memory[variant] = peak_memory(device) - before / 2**20 if device.type == "cuda" else None
    functions = {variant: lambda derain=derain: list(derain.pictures(pictures)) for variant, derain in variants.items()}
    functions[BASELINE] = by_default(functions[BASELINE])
    seconds = seconds_of(functions, repeats, device)
    rows = []
    for variant, result in results.items():
        between = min(psnr(((result - results[BASELINE]) ** 2).mean(), 255), 200.0)
        least = LEAST_PSNR["bfloat16" if "bfloat16" in variant else "float32"]
        assert between > least, f"{name}, {variant}: only {between:.1f} dB from the baseline's pictures"
        rows.append(
            {
                "network": name,
                "variant": variant,
                "pictures per second": count / seconds[variant],
                "times as fast": seconds[BASELINE] / seconds[variant],
                "PSNR to the first": between,
                "MiB above the weights": memory[variant],
            }
        )
    return rows


def main():
    args = parse_args(__doc__, NETWORKS, repeats=5)
    count = 32 if args.device.type == "cuda" else 1
    rows = [row for name in args.networks for row in compare(name, args.device, args.repeats, count)]
    report("pictures", rows, args.device, repeats=args.repeats, pictures=f"{count} of {WIDTH}×{HEIGHT}")


if __name__ == "__main__":
    main()
