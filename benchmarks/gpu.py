"""Everything to measure on a GPU, in ten minutes: training NeRD-Rain at the published recipe (batch 1 × 256²) and at
batch 8, and deraining pictures of 481×321, eager and compiled, each beside the published formulation in this process.

python -m benchmarks.gpu
python -m benchmarks.gpu --device cpu --quick         # tries the command

Prints README's table and writes gpu_gpu.json, both anew after each part: nothing is lost if the time runs out.
"""

import gc
import sys
import time
import traceback
from functools import partial

import torch

from benchmarks import inference, training
from benchmarks.common import parse_args, report

LAST_START = 420  # seconds, after which no other part begins: compiling takes minutes


def main(argv=None):
    args = parse_args(__doc__, argv)
    patch, batch, count = (32, 2, 2) if args.quick else (256, 8, 16)
    parts = [
        partial(training.compare, "NeRD-Rain", args, 1, patch),
        partial(inference.compare, "NeRD-Rain", args, count),
        partial(inference.compare, "NeRD-Rain-S", args, count),
        partial(training.compare, "NeRD-Rain", args, batch, patch, ["bfloat16"]),
    ]
    if args.device.type == "cuda":
        compiled = ["bfloat16, compiled"]
        parts += [
            partial(training.compare, "NeRD-Rain", args, batch, patch, compiled),
            partial(inference.compare, "NeRD-Rain", args, count, compiled),
            partial(training.compare, "NeRD-Rain", args, 1, patch, compiled),
            partial(inference.compare, "NeRD-Rain-S", args, count, compiled),
        ]
    start, rows, failed = time.monotonic(), [], 0
    for part in parts:
        if time.monotonic() - start > LAST_START:
            print("the time is up: the other parts are omitted")
            break
        try:
            rows += part()
        except Exception:  # of compilers, for example; the other parts are worth having
            traceback.print_exc()
            failed += 1
        else:
            report("gpu", rows, args)
        torch.compiler.reset()
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    sys.exit(f"{failed} parts failed" if failed else 0)


if __name__ == "__main__":
    main()
