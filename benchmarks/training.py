"""A training step (forward, losses, backward, Adam): ours against the published formulation, at equal batch and patch.

python -m benchmarks.training             # pictures per second, ratio, and the losses of both after the same steps
"""

import torch

from benchmarks.common import by_default, parse_args, report, seconds_of
from losses import DerainLoss
from tests.golden import golden_network
from tests.yardstick import yardstick

STEPS = 3  # after which the losses must still agree
SIZES = ((1, 64), (4, 64), (1, 128))  # batch, patch


class Step:
    """One optimizer step of a network on always the same batch."""

    def __init__(self, net, batch, patch, bf16=False, fused=True):
        self.net, self.bf16, self.loss = net, bf16, DerainLoss().to(next(net.parameters()).device)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=fused)
        generator = torch.Generator().manual_seed(0)
        device = next(net.parameters()).device
        self.rainy, self.clean = (torch.rand(batch, 3, patch, patch, generator=generator).to(device) for _ in range(2))

    def __call__(self):
        with torch.autocast(self.rainy.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.net(self.rainy)
        total = self.loss([output.float() for output in outputs], self.clean)["total"]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return total.item()


def compare(name, batch, patch, device, repeats):
    """-> rows of the table for one network and size."""
    base = golden_network(name).to(device)
    last = {"memory_format": torch.channels_last}
    steps = {
        "published formulation, float32": by_default(Step(yardstick(base), batch, patch, fused=False)),
        "ours, float32": Step(golden_network(name).to(device, **last), batch, patch),
        "ours, bfloat16": Step(golden_network(name).to(device, **last), batch, patch, bf16=True),
    }
    losses = {variant: [step() for _ in range(STEPS)][-1] for variant, step in steps.items()}
    expected = losses["published formulation, float32"]
    if device.type == "cpu":
        assert abs(losses["ours, float32"] / expected - 1) < 1e-4, f"{name}: the losses differ: {losses}"
    seconds = seconds_of(steps, repeats, device)
    return [
        {
            "network": name,
            "batch × patch": f"{batch} × {patch}²",
            "variant": variant,
            "pictures per second": batch / seconds[variant],
            "times as fast": seconds["published formulation, float32"] / seconds[variant],
            f"loss in step {STEPS}": losses[variant],
        }
        for variant in steps
    ]


def main():
    args = parse_args(__doc__, repeats=5, networks=("nerd_rain_s",))
    rows = [
        row
        for name in args.networks
        for batch, patch in SIZES
        for row in compare(name, batch, patch, args.device, args.repeats)
    ]
    report("training", rows, args.device, repeats=args.repeats)


if __name__ == "__main__":
    main()
