"""Exports a network to ONNX, to run it without PyTorch (docs/onnx_example.py does), and compares the two.

    python export.py                                             # this repository's own weights -> nerd_rain_s.onnx
    python export.py --weights model_best.pth --output rain.onnx --size 256 256 --float16

Input "rainy" and output "derained" are N×3×H×W, RGB in [0, 1], float32 whatever the precision inside; results are not
clamped. N is free, and H and W are any multiples of 16; with --size they are that, and N is 1. Where the largest
difference to PyTorch on --pictures is above the limit of the precision, nothing is written and the status is 1.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model import MULTIPLE
from utils.checkpoint import OWN_WEIGHTS, load_network, network_name
from utils.errors import UserError, reports_errors
from utils.files import atomic_path
from utils.images import find_pictures, read_image, reflect_pad, to_tensor
from utils.inference import WINDOW

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 (PyTorch's exporter needs it)
    from onnxruntime.transformers.float16 import convert_float_to_float16
except ImportError:
    onnx = None

OPSET = 20  # the first with GELU as one operation; onnxruntime has it since 1.17, older than what computes it here
LIMITS = {"float32": 1e-4, "float16": 2e-2}  # largest differences of values in [0, 1]
REPEATS = 5
# Sums over all pixels overflow in float16.
FLOAT32_OPERATORS = ["MatMul", "Gemm", "Einsum", "ReduceSum", "ReduceSumSquare", "Softmax", "LayerNormalization"]
PICTURES = Path(__file__).parent / "Datasets" / "demo" / "test" / "input"


class FullSize(nn.Module):
    """A network that returns its full-size result alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, rainy):
        return self.net(rainy)[0]


def to_onnx(net, size=None, half=False):
    """-> ONNX model. `size` (height, width) fixes the size; else N, H and W are free."""
    free = {0: torch.export.Dim("batch", max=64)}
    free |= {side: MULTIPLE * torch.export.Dim(name, min=1, max=512) for side, name in ((2, "rows"), (3, "columns"))}
    example = torch.rand(2, 3, 3 * MULTIPLE, 5 * MULTIPLE) if size is None else torch.rand(1, 3, *size)
    program = torch.onnx.export(
        FullSize(net.eval()),
        (example,),
        dynamo=True,
        dynamic_shapes=None if size else {"rainy": free},
        input_names=["rainy"],
        output_names=["derained"],
        opset_version=OPSET,
        optimize=True,
        verbose=False,
    )
    content = program.model_proto
    if half:
        content = convert_float_to_float16(content, keep_io_types=True, op_block_list=FLOAT32_OPERATORS)
        nodes = {}
        for node in content.graph.node:
            nodes.setdefault(node.output[0], node)  # the converter repeats some of its casts
        del content.graph.node[:]
        content.graph.node.extend(nodes.values())
    return content


def batches(pictures, size=None):
    """Picture files -> each one's upper left part of `size`, or of at most one window, 1×3×H×W; smaller ones are
    reflected."""
    for path in pictures:
        image = read_image(path)
        sides = size or [min(WINDOW, -(-side // MULTIPLE) * MULTIPLE) for side in image.shape[:2]]
        image = reflect_pad(image, *map(max, image.shape[:2], sides))[: sides[0], : sides[1]]
        yield path, to_tensor(image)[None]


def median_seconds(run):
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(net, path, pictures, size):
    """Prints a row for each picture -> the largest difference."""
    onnxruntime.set_default_logger_severity(3)  # errors; it warns of each operation that it has in float32 only
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    net, differences = net.to(memory_format=torch.channels_last).eval(), []
    print(f"{'picture':24} {'size':>9}  largest difference  PyTorch  onnxruntime")
    for picture, rainy in batches(pictures, size):
        array, rainy = rainy.numpy(), rainy.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected = net(rainy)[0].numpy()
            seconds = median_seconds(lambda x=rainy: net(x))
        differences.append(float(np.abs(session.run(None, {"rainy": array})[0] - expected).max()))
        others = median_seconds(lambda x=array: session.run(None, {"rainy": x}))
        shape = "{2}×{3}".format(*array.shape)
        print(f"{picture.name:24} {shape:>9}  {differences[-1]:18.1e}  {seconds:5.2f} s  {others:9.2f} s", flush=True)
    return max(differences)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=OWN_WEIGHTS, help="a checkpoint (default: this repository's)")
    parser.add_argument("--output", type=Path, help="the file to write (default: named after the weights, here)")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="fixes the size of pictures")
    parser.add_argument("--float16", action="store_true", help="half precision inside, but for sums over all pixels")
    parser.add_argument("--pictures", default=PICTURES, help="what to compare on (default: the demo's)")
    args = parser.parse_args(argv)
    if args.size and (min(args.size) < MULTIPLE or any(side % MULTIPLE for side in args.size)):
        parser.error(f"--size must be multiples of {MULTIPLE}")
    if onnx is None:
        raise UserError("the export needs onnx, onnxscript and onnxruntime: pip install -r requirements-extras.txt")
    pictures, net = find_pictures(args.pictures)[0], load_network(args.weights)
    output = args.output or Path(f"{args.weights.stem}.onnx")
    if output.is_dir():
        raise UserError(f"{output} is a folder: give --output a file in it.")
    for path in pictures:  # minutes before they are needed
        read_image(path)
    precision = "float16" if args.float16 else "float32"
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it cannot simplify
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        content = to_onnx(net, args.size, args.float16)
    size = "{}×{}".format(*args.size) if args.size else "any multiples of 16"
    print(f"{network_name(net)}, {precision}, {size}, opset {OPSET}: {len(content.graph.node)} operations")
    with atomic_path(output) as path:
        onnx.save(content, path)
        difference = compare(net, path, pictures, args.size)
        if not difference < LIMITS[precision]:
            limit = f"{LIMITS[precision]:.0e}"
            sys.exit(
                f"error: it differs from PyTorch by {difference:.1e}, more than {limit}: {output} was not written."
            )
    print(f"-> {output}")


if __name__ == "__main__":
    main()
