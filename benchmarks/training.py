"""A training step (forward, losses, backward, Adam): ours against the published formulation, at equal batch and patch.

python -m benchmarks.training             # pictures per second, ratio, losses after the same steps, and memory: what
                                          # the forward pass keeps for the backward one
"""

import torch

from benchmarks.common import by_default, parse_args, report, seconds_of
from losses import DerainLoss
from model import checkpoint_activations
from tests.golden import golden_network
from tests.yardstick import yardstick

STEPS = 3  # after which the losses must still agree
SIZES = ((1, 64), (4, 64), (1, 128), (1, 256))  # batch, patch; the last are the published ones


class Step:
    """One optimizer step of a network on always the same batch."""

    def __init__(self, net, batch, patch, bf16=False, fused=True, compiled=False):
        self.net, self.bf16 = torch.compile(net) if compiled else net, bf16
        self.loss = DerainLoss().to(next(net.parameters()).device)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=fused)
        generator = torch.Generator().manual_seed(0)
        device = next(net.parameters()).device
        self.rainy, self.clean = (torch.rand(batch, 3, patch, patch, generator=generator).to(device) for _ in range(2))

    def forward(self):
        with torch.autocast(self.rainy.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.net(self.rainy)
        return self.loss([output.float() for output in outputs], self.clean)["total"]

    def __call__(self):
        total = self.forward()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return total.item()


def kept_activations(forward):
    """-> MiB of tensors that a forward pass keeps for its backward pass."""
    sizes = {}

    def remember(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that its own graph holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = forward()  # as long as it lives, no storage is used twice
    del result
    return sum(sizes.values()) / 2**20


def compare(name, batch, patch, device, repeats, compiled=False):
    """-> rows of the table for one network and size."""

    def ours(prepare=lambda net: net, **options):
        net = prepare(golden_network(name).to(device, memory_format=torch.channels_last))
        return Step(net, batch, patch, **options)

    steps = {
        "published formulation, float32": Step(yardstick(golden_network(name).to(device)), batch, patch, fused=False),
        "ours, float32": ours(),
        "ours, bfloat16": ours(bf16=True),
        "ours, bfloat16, --save_memory": ours(checkpoint_activations, bf16=True),
    }
    memory = {variant: kept_activations(step.forward) for variant, step in steps.items()}
    if compiled:
        steps |= {
            "ours, float32, --compile": ours(compiled=True),
            "ours, bfloat16, --compile": ours(bf16=True, compiled=True),
        }
    steps["published formulation, float32"] = by_default(steps["published formulation, float32"])
    losses = {variant: [step() for _ in range(STEPS)][-1] for variant, step in steps.items()}
    expected = losses["published formulation, float32"]
    for variant, loss in losses.items():
        tolerance = 0.05 if "bfloat16" in variant else 1e-4 if device.type == "cpu" else 1e-2
        assert abs(loss / expected - 1) < tolerance, f"{name}, {variant}: the losses differ: {losses}"
    seconds = seconds_of(steps, repeats, device)
    return [
        {
            "network": name,
            "batch × patch": f"{batch} × {patch}²",
            "variant": variant,
            "pictures per second": batch / seconds[variant],
            "times as fast": seconds["published formulation, float32"] / seconds[variant],
            f"loss in step {STEPS}": losses[variant],
            "MiB kept": memory.get(variant),
        }
        for variant in steps
    ]


def main():
    args = parse_args(__doc__, repeats=5, networks=("nerd_rain_s",), compiles=True)
    rows = [
        row
        for name in args.networks
        for batch, patch in SIZES
        for row in compare(name, batch, patch, args.device, args.repeats, args.compile)
    ]
    report("training", rows, args.device, repeats=args.repeats)


if __name__ == "__main__":
    main()
