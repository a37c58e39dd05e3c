"""Deraining by 256×256 windows: ours against the published formulation, which takes one window after the other, with
the same weights. A GPU derains photographs of 481×321, a CPU one window. On a GPU the published formulation's
convolutions round to TF32, which is PyTorch's default; ours do not.

python -m benchmarks.inference
"""

from functools import partial

import numpy as np
import torch
from skimage import data

from benchmarks.common import BASELINE, EAGER, VARIANTS, as_rows, make_network, parse_args, report, run_rounds
from benchmarks.published import published
from utils.derain import Derainer
from utils.files import UserError, reports_errors
from utils.rain import add_rain


def compare(name, args, count, variants=EAGER):
    """-> rows of the table for one network and `count` pictures."""
    height, width, window = (321, 481, 256) if args.device.type == "cuda" else (256, 256, 256)
    if args.quick:
        height, width, window = 40, 56, 32
    photograph, rng = data.astronaut()[:height, :width], np.random.default_rng(0)
    pictures = [(number, add_rain(photograph, rng).astype(np.float32) / 255) for number in range(count)]

    def over_pictures(derainer):
        return lambda: torch.from_numpy(np.stack([result for _, result in derainer.stream(pictures)])), count

    def baseline():
        derainer = Derainer(published(make_network(name, args)), mode="window", window=window)
        derainer.net.to(memory_format=torch.contiguous_format)
        derainer.compute = torch.inference_mode()(lambda x: derainer.net(x.contiguous())[0])  # PyTorch's settings
        derainer.batch_pixels = 1  # one window at a time
        return over_pictures(derainer)

    def ours(options):
        derainer = Derainer(make_network(name, args), mode="window", window=window, **options)
        if options.get("compile") and not derainer.compiled:
            raise UserError(f"{name} was not compiled.")
        return over_pictures(derainer)

    builders = {BASELINE: baseline, **{variant: partial(ours, VARIANTS[variant]) for variant in variants}}
    runs = run_rounds(builders, args)
    return as_rows(runs, network=name, task=f"deraining {width}×{height}")


@reports_errors
def main(argv=None):
    args = parse_args(__doc__, argv)
    count = 16 if args.device.type == "cuda" else 1
    rows = [row for name in ("NeRD-Rain-S", "NeRD-Rain") for row in compare(name, args, count)]
    report("inference", rows, args)


if __name__ == "__main__":
    main()
