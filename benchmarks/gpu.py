"""Everything to measure on a GPU, in ten minutes: training NeRD-Rain at the published recipe (batch 1 × 256²) and at
batch 8, and deraining pictures of 481×321, eager and compiled, each beside the published formulation in this process.

python -m benchmarks.gpu
python -m benchmarks.gpu --gpus cpu --quick         # tries the command

Prints the table and writes gpu_gpu.json, both anew after each part: nothing is lost if the time runs out.
"""

import gc
import sys
import time
import traceback

import torch

from benchmarks import inference, training
from benchmarks.common import EAGER, parse_args, report
from utils.files import counted, reports_errors

LAST_START = 420  # seconds, after which no other part begins: compiling takes minutes


@reports_errors
def main(argv=None):
    args = parse_args(__doc__, argv)
    patch, batch, count = (32, 2, 2) if args.quick else (256, 8, 16)
    compiled = ["bfloat16, compiled"]
    parts = [
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
