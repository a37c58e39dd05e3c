"""Deraining a window: ours against the published formulation, with the same weights and the same inputs.

python -m benchmarks.inference            # seconds, ratio, largest difference of the output, PSNR between the two
"""

import torch

from benchmarks.common import NETWORKS, by_default, parse_args, report, seconds_of
from evaluations.metrics import psnr
from tests.golden import golden_network
from tests.yardstick import yardstick
from utils.devices import strict_float32

TOLERANCE = 1e-5  # of float32 outputs on a CPU; GPUs compute convolutions in other orders
SIDE = 256


@torch.inference_mode()
@strict_float32()
def compare(name, device, repeats):
    """-> rows of the table for one network."""
    net = golden_network(name).eval().to(device)
    plain = yardstick(net)
    net = net.to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    x_last = x.to(memory_format=torch.channels_last)

    def ours_bf16():
        with torch.autocast(device.type, torch.bfloat16):
            return net(x_last)[0].float()

    variants = {
        "published formulation, float32": by_default(lambda: plain(x)[0]),
        "ours, float32": lambda: net(x_last)[0],
        "ours, bfloat16": ours_bf16,
    }
    expected = plain(x)[0]
    seconds = seconds_of(variants, repeats, device)
    rows = []
    for variant, function in variants.items():
        output = function()
        difference = (output - expected).abs().max().item()
        if device.type == "cpu" and "float32" in variant:
            assert difference < TOLERANCE, f"{name}, {variant}: outputs differ by {difference}"
        mse = (output.clamp(0, 1) - expected.clamp(0, 1)).square().mean().item()
        rows.append(
            {
                "network": name,
                "variant": variant,
                "seconds": seconds[variant],
                "times as fast": seconds["published formulation, float32"] / seconds[variant],
                "largest difference": difference,
                "PSNR between them": min(psnr(mse, 1), 200.0),
            }
        )
    return rows


def main():
    args = parse_args(__doc__, NETWORKS, repeats=7)
    rows = [row for name in args.networks for row in compare(name, args.device, args.repeats)]
    report("inference", rows, args.device, repeats=args.repeats, input=f"1×3×{SIDE}×{SIDE}")


if __name__ == "__main__":
    main()
