"""Exports a network to ONNX, to run it without PyTorch (docs/onnx_example.py), once it gives the same pictures.

    python export.py                                             # this repository's own weights -> nerd_rain_s.onnx
    python export.py --weights model_best.pth --output rain.onnx --size 256 256 --float16

Input "rainy" and output "derained" are N×3×H×W float32, RGB in [0, 1]; results are not clamped. N is free, H and W are
any multiples of 16; --size fixes H and W, and N is then 1. Where results differ from PyTorch's by more than 1e-4, or
2e-2 with --float16, nothing is written and the exit status is 1.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ablations import network_name
from model import MULTIPLE
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import WINDOW, to_tensor
from utils.files import UserError, atomic_write, counted, reports_errors
from utils.pictures import find_pictures, read_image, reflect_pad

try:
    import onnxruntime
    import onnxscript  # noqa: F401 (PyTorch's exporter needs it)
    from onnxruntime.transformers.float16 import convert_float_to_float16  # needs onnx
except ImportError:
    onnxruntime = None

OPSET = 20  # the first with GELU as one operation
LIMITS = {"float32": 1e-4, "float16": 2e-2}  # largest differences of values in [0, 1]
# Sums over all pixels overflow in float16.
FLOAT32_OPERATORS = ["MatMul", "Gemm", "Einsum", "ReduceSum", "ReduceSumSquare", "Softmax", "LayerNormalization"]
PICTURES = Path(__file__).parent / "Datasets" / "demo" / "test" / "input"


class FullSize(nn.Sequential):
    """A network that returns its full-size result alone."""

    def forward(self, rainy):
        return self[0](rainy)[0]


def to_onnx(net, size=None, float16=False):
    """-> ONNX model. `size` (height, width) fixes the size of its input; by default N, H and W are free."""
    example = torch.rand(1, 3, *size) if size else torch.rand(2, 3, 3 * MULTIPLE, 5 * MULTIPLE)
    rows, columns = (MULTIPLE * torch.export.Dim(name, min=1, max=512) for name in ("rows", "columns"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            FullSize(net.eval()),
            (example,),
            dynamo=True,
            dynamic_shapes=None if size else ({0: torch.export.Dim("batch", max=64), 2: rows, 3: columns},),
            input_names=["rainy"],
            output_names=["derained"],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    model = program.model_proto
    if float16:
        model = convert_float_to_float16(model, keep_io_types=True, op_block_list=FLOAT32_OPERATORS)
        nodes = {node.output[0]: node for node in reversed(model.graph.node)}  # the converter repeats some of its casts
        del model.graph.node[:]
        model.graph.node.extend(reversed(nodes.values()))
    return model


def crop(image, size=None):
    """A picture -> 1×3×H×W: its upper left part of `size`, by default of at most one window; padded by reflection."""
    height, width = size or (min(WINDOW, -(-side // MULTIPLE) * MULTIPLE) for side in image.shape[:2])
    return to_tensor(reflect_pad(image, height, width)[:height, :width])[None]


def compare(net, model, images):
    """Runs images, 1×3×H×W, through a network and a serialized ONNX model -> the largest difference. Prints times."""
    onnxruntime.set_default_logger_severity(3)  # errors; it warns of each operation that it has in float32 only
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    net = net.to(memory_format=torch.channels_last).eval()
    start = time.perf_counter()
    with torch.inference_mode():
        expected = [net(image.contiguous(memory_format=torch.channels_last))[0].numpy() for image in images]
    between = time.perf_counter()
    results = [session.run(None, {"rainy": image.numpy()})[0] for image in images]
    end = time.perf_counter()
    times = f"{between - start:.2f} s with PyTorch, {end - between:.2f} s with ONNX Runtime, on the CPU"
    print(f"{counted(len(images), 'picture')}: {times}")
    return float(np.max([np.abs(a - b).max() for a, b in zip(results, expected)]))  # NaN if any is


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=OWN_WEIGHTS, help="a checkpoint (default: this repository's)")
    parser.add_argument("--output", type=Path, help="the file to write (default: named after the weights, here)")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="fixes the size of pictures")
    parser.add_argument("--float16", action="store_true", help="half precision inside, except for sums over all pixels")
    parser.add_argument("--pictures", default=PICTURES, help="what to compare on (default: the demo's)")
    args = parser.parse_args(argv)
    if args.size and (min(args.size) < MULTIPLE or any(side % MULTIPLE for side in args.size)):
        parser.error(f"--size must be multiples of {MULTIPLE}")
    if onnxruntime is None:
        raise UserError("the export needs onnx, onnxscript and onnxruntime: pip install -r requirements-extras.txt")
    if torch.__version__.startswith("2.6."):
        raise UserError("the exporter of PyTorch 2.6 fails on these networks: install a newer PyTorch.")
    net, output = load_network(args.weights), args.output or Path(f"{args.weights.stem}.onnx")
    if output.is_dir():
        raise UserError(f"{output} is a folder: give --output a file in it.")
    images = [crop(read_image(path), args.size) for path in find_pictures(args.pictures)[0]]
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it cannot simplify
    model, limit = to_onnx(net, args.size, args.float16), LIMITS["float16" if args.float16 else "float32"]
    print(f"{network_name(net)}: {counted(len(model.graph.node), 'operation')} of opset {OPSET}")
    content = model.SerializeToString()
    difference = compare(net, content, images)
    if not difference < limit:
        raise UserError(
            f"results differ from PyTorch's by {difference:.1e}, more than {limit:.0e}: {output} was not written. "
            "Please report this with your versions of torch, onnx and onnxruntime."
        )
    with atomic_write(output) as file:
        file.write(content)
    print(f"{output} differs from PyTorch by at most {difference:.1e}")


if __name__ == "__main__":
    main()
