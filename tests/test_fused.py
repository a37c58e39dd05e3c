"""The Triton kernels without a GPU: computed by Triton's interpreter, and compiled for two generations of GPUs."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import MultiscaleNet, TransformerBlock
from tests.golden import golden_network
from utils.inference import Derainer

pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for GPUs")
ROOT = Path(__file__).parent.parent
INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import sys
import torch
from tests.test_fused import {function}
{function}()
"""


def interpret(function):
    """Runs a function of this module in a process whose kernels are interpreted."""
    command = [sys.executable, "-c", INTERPRETED.format(function=function.__name__)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def compare_blocks():
    from utils.fused import FusedBlock

    torch.manual_seed(0)
    for name in ("nerd_rain_s", "nerd_rain"):
        net = golden_network(name)
        blocks = {b.attn.qkv.in_channels: b for b in net.modules() if isinstance(b, TransformerBlock)}
        for channels, block in list(blocks.items())[:2]:
            x = torch.randn(2, channels, 7, 11).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                expected = block(x)
                for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 5e-3)):
                    result = FusedBlock(block, dtype)(x)
                    difference = (result - expected).abs().max() / expected.abs().max()
                    assert result.dtype == dtype and result.shape == x.shape and difference < tolerance, difference


def compare_networks():
    from utils.fused import FusedBlock, fuse_blocks

    torch.manual_seed(0)
    net = MultiscaleNet(dim=16, num_blocks=(1, 1, 1))
    fused = fuse_blocks(copy.deepcopy(net), torch.float32)
    assert not any(isinstance(module, TransformerBlock) for module in fused.modules())
    assert sum(isinstance(module, FusedBlock) for module in fused.modules()) == 30
    x = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        for result, expected in zip(fused(x), net(x)):
            assert (result - expected).abs().max() < 1e-5


def test_fused_blocks_compute_what_plain_ones_do():
    interpret(compare_blocks)


@pytest.mark.slow
def test_a_network_of_fused_blocks_gives_the_same_pictures():
    interpret(compare_networks)


def test_the_plain_network_runs_where_kernels_do_not(caplog):
    if torch.cuda.is_available():
        pytest.skip("kernels work on the CPU of a machine with a GPU neither, but ask its driver")
    from utils.fused import fuse_blocks

    net = MultiscaleNet(dim=16, num_blocks=(1, 1, 1))
    assert fuse_blocks(net, torch.float32) is net
    assert "the plain network runs instead" in caplog.text
    assert any(isinstance(module, TransformerBlock) for module in net.modules())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_kernels_compile(capability, element):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from utils import fused

    tile = fused.TILE // {"bf16": 2, "fp32": 4}[element]
    constants = {
        "norm_project_kernel": {"CHANNELS": 192, "OUTPUTS": 576, "ROWS": tile, "BLOCK_C": 256, "BLOCK_N": 64},
        "attention_sums_kernel": {"HEADS": 4, "WIDTH": 48, "PIXELS": tile, "BLOCK": 64},
        "gate_project_kernel": {"HIDDEN": 512, "CHANNELS": 192, "PIXELS": tile, "BLOCK_C": 256, "BLOCK_H": 32},
    }
    for name, values in constants.items():
        kernel, types = getattr(fused, name), {"scale": "*fp32", "shift": "*fp32", "products": "*fp32"}
        types |= {
            "squares": "*fp32",
            "rows": "i32",
            "height": "i32",
            "width": "i32",
            **dict.fromkeys(values, "constexpr"),
        }
        signature = {argument: types.get(argument, f"*{element}") for argument in kernel.arg_names}
        places = {argument: (place,) for place, argument in enumerate(kernel.arg_names)}
        aligned = {places[argument]: [["tt.divisibility", 16]] for argument in places if argument not in values}
        constexprs = {places[argument]: value for argument, value in values.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fused.WARPS})
        assert compiled.metadata.shared <= 99 * 1024, f"{name} asks for more shared memory than most GPUs have"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_fused_networks_on_a_gpu_give_the_same_pictures(bf16, caplog):
    net = golden_network("nerd_rain_s").to("cuda", memory_format=torch.channels_last).eval()
    images = [np.random.default_rng(seed).integers(0, 255, (96, 160, 3), dtype=np.uint8) for seed in range(3)]
    expected = [Derainer(net, window=64)(image) for image in images]
    fused = Derainer(net, window=64, bf16=bf16, fused=True)
    for _ in range(2):  # captured, then replayed
        for image, other in zip(images, expected):
            difference = np.abs(fused(image).astype(int) - other)
            assert difference.mean() < (2 if bf16 else 1e-3)
    assert not caplog.text
