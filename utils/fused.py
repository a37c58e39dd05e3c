"""The transformer block in five passes over memory, and the network as one CUDA graph: for inference on NVIDIA GPUs.

A block's time on a GPU goes into carrying tensors to memory and back, not into arithmetic. Three Triton kernels compute
what model.TransformerBlock does while each tensor is at hand: normalisation with the 1×1 convolution after it;
depthwise convolution with the sums that channel attention needs; depthwise convolution, gate, 1×1 convolution and
residual. Sums run in float32. Tensors are rows of channels, one row per pixel, as channels-last pictures are stored.
"""

import logging

import torch
import triton
import triton.language as tl
from torch import nn

from model import TransformerBlock
from utils.devices import strict_float32

ALIGNMENT = 16  # channels: the smallest side of a matrix product, and 32 bytes in bfloat16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the self-test, relative to the largest value
TILE = 128  # bytes of one channel that a program takes at a time; more of them spill registers
WARPS = 8
SHARES = 64  # programs that share out the pixels of a sample and head; their sums are added at the end
GRAPHS = 4  # shapes that get a CUDA graph; each holds on to its memory
logger = logging.getLogger(__name__)


@triton.jit
def norm_project_kernel(
    x,
    scale,
    shift,
    weight,
    result,
    rows,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """LayerNorm of each row, then a product: rows×CHANNELS -> rows×OUTPUTS."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, BLOCK_C)
    known = channel < CHANNELS
    values = tl.load(x + row * CHANNELS + channel[None, :], mask=(row < rows) & known[None, :], other=0.0)
    values = values.to(tl.float32)
    mean = tl.sum(values, axis=1) / CHANNELS
    values = tl.where(known[None, :], values - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(values * values, axis=1) / CHANNELS + 1e-5)
    values = values / deviation[:, None] * tl.load(scale + channel, mask=known, other=0.0)[None, :]
    values = (values + tl.load(shift + channel, mask=known, other=0.0)[None, :]).to(x.dtype.element_ty)
    for start in tl.range(0, OUTPUTS, BLOCK_N, num_stages=1):
        output = start + tl.arange(0, BLOCK_N)[None, :]
        kernel = tl.load(
            weight + channel[:, None] * OUTPUTS + output, mask=known[:, None] & (output < OUTPUTS), other=0.0
        )
        product = tl.dot(values, kernel, input_precision="ieee")
        mask = (row < rows) & (output < OUTPUTS)
        tl.store(result + row * OUTPUTS + output, product.to(result.dtype.element_ty), mask=mask)


@triton.jit
def depthwise(image, filters, pixel, channel, known, height, width, CHANNELS: tl.constexpr):
    """3×3 depthwise convolution of an image of height·width rows of CHANNELS, at some pixels P and channels K -> P×K,
    float32; 0 where a pixel lies behind the image's end."""
    y, x = (pixel // width)[:, None], (pixel % width)[:, None]
    channel, total = channel[None, :], tl.zeros((pixel.shape[0], channel.shape[0]), tl.float32)
    for tap in tl.range(9, num_stages=1):
        row, column = y + tap // 3 - 1, x + tap % 3 - 1
        inside = (y < height) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        address = image + (row * width + column) * CHANNELS + channel
        values = tl.load(address, mask=inside & known[None, :], other=0.0).to(tl.float32)
        weights = tl.load(filters + tap * CHANNELS + channel, mask=known[None, :], other=0.0).to(tl.float32)
        total += values * weights
    return total


@triton.jit
def attention_sums_kernel(
    qkv,
    filters,
    v_result,
    products,
    squares,
    height,
    width,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Depthwise convolution of q, k and v. Writes v, and over this program's share of a sample's pixels, for one head
    of WIDTH channels, the sums q^T k (WIDTH×WIDTH) and the sums of squares of q and k (2×WIDTH)."""
    CHANNELS: tl.constexpr = HEADS * WIDTH
    share, shares, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    image = qkv + sample * height * width * 3 * CHANNELS
    index = tl.arange(0, BLOCK)
    known, channel = index < WIDTH, head * WIDTH + index
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    q_squares, k_squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(share * PIXELS, height * width, shares * PIXELS, num_stages=1):
        pixel = start + tl.arange(0, PIXELS)
        q = depthwise(image, filters, pixel, channel, known, height, width, 3 * CHANNELS).to(qkv.dtype.element_ty)
        k = depthwise(image, filters, pixel, CHANNELS + channel, known, height, width, 3 * CHANNELS).to(q.dtype)
        product += tl.dot(tl.trans(q), k, input_precision="ieee")
        q_squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=0)
        k_squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=0)
        v = depthwise(image, filters, pixel, 2 * CHANNELS + channel, known, height, width, 3 * CHANNELS)
        address = v_result + sample * height * width * CHANNELS + pixel[:, None] * CHANNELS + channel[None, :]
        mask = (pixel < height * width)[:, None] & known[None, :]
        tl.store(address, v.to(v_result.dtype.element_ty), mask=mask)
    place = (sample * HEADS + head) * shares + share
    mask = known[:, None] & known[None, :]
    tl.store(products + (place * WIDTH + index[:, None]) * WIDTH + index[None, :], product, mask=mask)
    tl.store(squares + place * 2 * WIDTH + index, q_squares, mask=known)
    tl.store(squares + (place * 2 + 1) * WIDTH + index, k_squares, mask=known)


@triton.jit
def gate_project_kernel(
    hidden,
    filters,
    weight,
    x,
    result,
    height,
    width,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Depthwise convolution of gate and value (HIDDEN channels each), GELU(gate)·value, a product, and the residual:
    -> x + …, rows of CHANNELS."""
    sample = tl.program_id(1).to(tl.int64)
    image = hidden + sample * height * width * 2 * HIDDEN
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    output = tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((PIXELS, BLOCK_C), tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_H, num_stages=1):
        channel = start + tl.arange(0, BLOCK_H)
        known = channel < HIDDEN
        gate = depthwise(image, filters, pixel, channel, known, height, width, 2 * HIDDEN)
        value = depthwise(image, filters, pixel, HIDDEN + channel, known, height, width, 2 * HIDDEN)
        gated = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * value
        mask = known[:, None] & (output < CHANNELS)
        kernel = tl.load(weight + channel[:, None] * CHANNELS + output, mask=mask, other=0.0)
        total += tl.dot(gated.to(hidden.dtype.element_ty), kernel, input_precision="ieee")
    place = sample * height * width * CHANNELS + pixel[:, None] * CHANNELS + output
    mask = (pixel < height * width)[:, None] & (output < CHANNELS)
    total += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + place, total.to(result.dtype.element_ty), mask=mask)


def block_of(channels):
    """-> the block size of a kernel for that many channels."""
    return max(ALIGNMENT, triton.next_power_of_2(channels))


def pad_channels(weight, dim):
    """Fills up each half (gate and value) of a dimension with zeros, to a multiple of ALIGNMENT."""
    halves = []
    for half in weight.chunk(2, dim):
        padding = list(half.shape)
        padding[dim] = -half.shape[dim] % ALIGNMENT
        halves += [half, half.new_zeros(padding)]
    return torch.cat(halves, dim)


class FusedBlock(nn.Module):
    """A model.TransformerBlock for inference, computing in `dtype`. B×C×H×W -> B×C×H×W, channels last."""

    def __init__(self, block, dtype):
        super().__init__()
        attn, ffn, self.dtype = block.attn, block.ffn, dtype
        self.heads, self.tile = len(attn.temperature), TILE // dtype.itemsize
        half_out = ffn.project_out.weight.flatten(1).T
        weights = {
            "norm1": torch.stack([block.norm1.body.weight, block.norm1.body.bias]),
            "norm2": torch.stack([block.norm2.body.weight, block.norm2.body.bias]),
            "temperature": attn.temperature,
            "qkv": attn.qkv.weight.flatten(1).T.to(dtype),  # C×3C
            "qkv_filters": attn.qkv_dwconv.main[0].weight.flatten(1).T.to(dtype),  # 9×3C
            "project": attn.project_out.weight.flatten(1).unflatten(1, (self.heads, -1)),  # C×heads×C/heads
            "hidden": pad_channels(ffn.project_in.weight.flatten(1).T, 1).to(dtype),  # C×2h, h a multiple of ALIGNMENT
            "hidden_filters": pad_channels(ffn.dwconv.main[0].weight.flatten(1).T, 1).to(dtype),  # 9×2h
            "out": pad_channels(torch.cat([half_out, half_out]), 0).chunk(2)[0].to(dtype),  # h×C
        }
        for name, weight in weights.items():
            self.register_buffer(name, weight.detach().contiguous(), persistent=False)

    def norm_project(self, rows, norm, weight):
        """B×H×W×C -> B×H×W×N."""
        channels, outputs = weight.shape
        result = rows.new_empty(*rows.shape[:-1], outputs)
        count = rows.numel() // channels
        norm_project_kernel[(triton.cdiv(count, self.tile),)](
            *(rows, norm[0], norm[1], weight, result, count, channels, outputs, self.tile),
            BLOCK_C=block_of(channels),
            BLOCK_N=64,
            num_warps=WARPS,
        )
        return result

    def forward(self, x):
        x = x.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        batch, height, width, channels = x.shape
        if height * width * max(3 * channels, 2 * len(self.out)) >= 2**31:
            raise ValueError(f"pictures of {height}×{width} pixels are too large for the fused kernels: use windows")
        head = channels // self.heads

        qkv = self.norm_project(x, self.norm1, self.qkv)
        shares = min(SHARES, triton.cdiv(height * width, self.tile))
        v = torch.empty_like(x)
        products = x.new_empty(batch, self.heads, shares, head, head, dtype=torch.float32)
        squares = x.new_empty(batch, self.heads, shares, 2, head, dtype=torch.float32)
        attention_sums_kernel[(shares, self.heads, batch)](
            *(qkv, self.qkv_filters, v, products, squares, height, width, self.heads, head, self.tile),
            BLOCK=block_of(head),
            num_warps=WARPS,
        )
        q_scale, k_scale = squares.sum(2).clamp_min(1e-24).rsqrt().unbind(2)  # B×heads×C/heads
        scores = products.sum(2) * q_scale[..., None] * k_scale[..., None, :]
        attention = (scores * self.temperature).softmax(dim=3)
        with torch.autocast(x.device.type, enabled=False):
            project = torch.einsum("ohc,bhcd->bhdo", self.project, attention).flatten(1, 2).to(self.dtype)  # B×C×C
            x = torch.baddbmm(x.flatten(1, 2), v.flatten(1, 2), project).unflatten(1, (height, width))

        hidden = self.norm_project(x, self.norm2, self.hidden)
        result = torch.empty_like(x)
        gate_project_kernel[(triton.cdiv(height * width, self.tile), batch)](
            *(hidden, self.hidden_filters, self.out, x, result, height, width, len(self.out), channels, self.tile),
            BLOCK_C=block_of(channels),
            BLOCK_H=32,
            num_warps=WARPS,
        )
        return result.permute(0, 3, 1, 2)


@torch.inference_mode()
def self_test(net, dtype):
    """Computes one block of each width both ways. Raises ArithmeticError where the results differ."""
    blocks = {block.attn.qkv.in_channels: block for block in net.modules() if isinstance(block, TransformerBlock)}
    for channels, block in blocks.items():
        device = block.attn.qkv.weight.device
        x = torch.rand(2, channels, 19, 21, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.autocast(device.type, enabled=False), strict_float32():
            expected = block(x)
        difference = (FusedBlock(block, dtype)(x) - expected).abs().max() / expected.abs().max()
        if not difference < TOLERANCE[dtype]:
            raise ArithmeticError(f"blocks of {channels} channels differ by {difference:.1e}")


class GraphedNetwork:
    """A network on a GPU whose kernels are replayed as one CUDA graph for each input shape: thousands of small launches
    from Python would take longer than their work. B×3×H×W -> the derained pictures, likewise, float32.

    The first shapes get a graph, others run as usual: no more than GRAPHS are kept.
    """

    def __init__(self, net, bf16):
        self.net, self.bf16, self.graphs = net, bf16, {}

    def run(self, x):
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            return self.net(x)[0].float()

    def capture(self, x):
        static = x.clone(memory_format=torch.channels_last)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and kernels set themselves up in a first run
            self.run(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.run(static)
        return graph, static, result

    def __call__(self, x):
        if x.shape not in self.graphs:
            if len(self.graphs) == GRAPHS:
                return self.run(x)
            self.graphs[x.shape] = self.capture(x)
        graph, static, result = self.graphs[x.shape]
        static.copy_(x)
        graph.replay()
        return result.clone()


def fuse_blocks(net, dtype):
    """Replaces the transformer blocks of a network that is on its device by fused ones, in place. Where they do not
    compile or fail the self-test, the network stays as it is, and a warning says so."""
    try:
        self_test(net, dtype)
    except Exception as error:  # compilers and drivers fail in many ways
        logger.warning("the fused kernels do not work here (%s): the plain network runs instead", error)
        return net
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, TransformerBlock):
                setattr(module, name, FusedBlock(child, dtype))
    return net
