"""Everything to measure on a GPU, in ten minutes: training NeRD-Rain at the published recipe (batch 1 × 256²) and at
batch 8, and deraining pictures of 481×321, eager and compiled, each beside the published formulation in this process;
before that, depthwise convolutions in the two memory layouts.

python -m benchmarks.gpu
python -m benchmarks.gpu --gpus cpu --quick         # tries the command

Prints the table and writes gpu_gpu.json, both anew after each part: nothing is lost if the time runs out.
"""

import gc
import sys
import time
import traceback
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import inference, training
from benchmarks.common import EAGER, as_rows, parse_args, report, run_rounds
from utils.files import counted, reports_errors

DEPTHWISE = ((144, 256), (127, 256), (510, 64))  # channels and side of some of NeRD-Rain's
LAST_START = 420  # seconds, after which no other part begins: compiling takes minutes


def compare_layouts(channels, side, args):
    """-> rows of the table for a depthwise convolution, forward and backward, in both layouts: channels-last ones are
    always cuDNN's, others may be PyTorch's own."""
    count = 100 if args.device.type == "cuda" else 1  # in a round

    def build(dtype, layout):
        rng = torch.Generator().manual_seed(0)
        x, weight = torch.rand(1, channels, side, side, generator=rng), torch.rand(channels, 1, 3, 3, generator=rng) / 9
        x, weight = (t.to(args.device, dtype, memory_format=layout).requires_grad_() for t in (x, weight))

        def convolve():
            for _ in range(count):
                result = F.conv2d(x, weight, padding=1, groups=channels)
                torch.autograd.grad(result, (x, weight), result.detach())
            return result[0, 0].detach().float().cpu()

        return convolve, count

    variants = {
        f"{str(dtype).removeprefix('torch.')}, {str(layout).removeprefix('torch.')}": partial(build, dtype, layout)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in (torch.contiguous_format, torch.channels_last)
    }
    runs = run_rounds(variants, args)
    return as_rows(runs, network="depthwise convolution", task=f"{channels} channels, {side}²")


@reports_errors
def main(argv=None):
    args = parse_args(__doc__, argv)
    patch, batch, count = (32, 2, 2) if args.quick else (256, 8, 16)
    compiled = ["bfloat16, compiled"]
    sizes = [(8, 32)] if args.quick else DEPTHWISE
    parts = [
        *((compare_layouts, *size, args) for size in sizes),
        (training.compare, "NeRD-Rain", args, 1, patch, EAGER),
        (inference.compare, "NeRD-Rain", args, count, EAGER),
        (inference.compare, "NeRD-Rain-S", args, count, EAGER),
        (training.compare, "NeRD-Rain", args, batch, patch, ["bfloat16"]),
        (training.compare, "NeRD-Rain", args, batch, patch, compiled),
        (inference.compare, "NeRD-Rain", args, count, compiled),
        (training.compare, "NeRD-Rain", args, 1, patch, compiled),
        (inference.compare, "NeRD-Rain-S", args, count, compiled),
    ]
    if args.device.type == "cpu":
        parts = [part for part in parts if part[-1] != compiled]
    start, rows, failed = time.monotonic(), [], 0
    for compare, *arguments in parts:
        if time.monotonic() - start > LAST_START:
            print("the time is up: the other parts are omitted")
            break
        try:
            rows += compare(*arguments)
            report("gpu", rows, args)
        except Exception:  # of compilers, for example; the other parts are worth having
            traceback.print_exc()
            failed += 1
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    sys.exit(f"{counted(failed, 'part')} failed" if failed else 0)


if __name__ == "__main__":
    main()
