"""Deraining photographs of 481×321 by 256×256 windows: ours against the published formulation, which takes one window
after the other, with the same weights.

python -m benchmarks.inference
"""

from functools import partial

import numpy as np
import torch
from skimage import data
from torch import nn

from benchmarks.common import BASELINE, EAGER, VARIANTS, as_rows, make_network, parse_args, report, run_rounds
from benchmarks.published import published
from utils.derain import Derainer
from utils.files import UserError
from utils.rain import add_rain

HEIGHT, WIDTH, WINDOW = 321, 481, 256


class Published(nn.Module):
    """The published formulation, on contiguous NCHW tensors whatever it is given."""

    def __init__(self, net):
        super().__init__()
        self.net = published(net)

    def forward(self, x):
        return self.net(x.contiguous())


def compare(name, args, count, variants=EAGER):
    """-> rows of the table for one network and `count` pictures."""
    (height, width), window = ((40, 56), 32) if args.quick else ((HEIGHT, WIDTH), WINDOW)
    photograph, rng = data.astronaut()[:height, :width], np.random.default_rng(0)
    pictures = [(number, add_rain(photograph, rng).astype(np.float32) / 255) for number in range(count)]

    def over_pictures(derainer):
        return lambda: torch.from_numpy(np.stack([result for _, result in derainer.pictures(pictures)]))

    def baseline():
        derainer = Derainer(Published(make_network(name, args.quick)).to(args.device), mode="window", window=window)
        derainer.net.to(memory_format=torch.contiguous_format)
        derainer.pixels = 1  # one window at a time
        return over_pictures(derainer)

    def ours(options):
        net = make_network(name, args.quick).to(args.device)
        derainer = Derainer(net, mode="window", window=window, **options)
        if options.get("compile") and not derainer.compiled:
            raise UserError(f"{name} was not compiled.")
        return over_pictures(derainer)

    factories = {BASELINE: baseline, **{variant: partial(ours, VARIANTS[variant]) for variant in variants}}
    runs = run_rounds(factories, args.rounds, args.device)
    return as_rows(runs, dict.fromkeys(runs, count), network=name, task=f"deraining {width}×{height}")


def main(argv=None):
    args = parse_args(__doc__, argv, networks=("NeRD-Rain-S", "NeRD-Rain"))
    count = 16 if args.device.type == "cuda" else 1
    report("inference", [row for name in args.networks for row in compare(name, args, count)], args)


if __name__ == "__main__":
    main()
