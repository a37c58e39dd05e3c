"""Parameters and multiply-adds of the networks for one 256×256 picture, as papers' tables list them.

python -m evaluations.complexity

Speed and memory are what `benchmarks/` measures.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from ablations import NETWORKS, build

SIDE = 256


def size_of(options):
    """-> numbers of parameters and of multiply-adds of ablations.build(**options) for one picture."""
    with torch.device("meta"):  # counts from shapes alone
        net, picture = build(**options).eval(), torch.empty(1, 3, SIDE, SIDE)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            net(picture)
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    print("| network | parameters (M) | multiply-adds (G) |\n|---|---|---|")
    for name, options in NETWORKS.items():
        parameters, multiply_adds = size_of(options)
        print(f"| {name} | {parameters / 1e6:.2f} | {multiply_adds / 1e9:.2f} |")


if __name__ == "__main__":
    main()
