"""NeRD-Rain: bidirectional multi-scale implicit neural representations for image deraining.

X. Chen, J. Pan, J. Dong, CVPR 2024, https://arxiv.org/abs/2404.01547. `MultiscaleNet.forward` is the paper's Figure 2.
Presets, ablations and the form with MPRNet's blocks are in ablations.py. Weights have the names, the order and the
initial values of the published code: released ones load with `strict=True`, and published optimizer states continue.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE = 16  # of height and width: the small scale works at 1/4 size and halves that twice


def resize(x, factor):
    """Nearest-neighbour resizing, the only kind in the network."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")


def named(**modules):
    """nn.Sequential with names: the published code wraps many single layers in a module."""
    return nn.Sequential(OrderedDict(modules))


def conv3x3(inputs, outputs, bias=False):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def conv1x1(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def depthwise3x3(channels):
    return named(main=nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)))


class PixelUnshuffle(nn.Module):
    """B×C×H×W -> B×4C×H/2×W/2, channels-last on every device: on CUDA PyTorch's module returns contiguous tensors."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B×H/2×2×W/2×2×C
        return x.permute(0, 1, 3, 5, 2, 4).flatten(3).permute(0, 3, 1, 2)


class PixelShuffle(nn.Module):
    """B×4C×H×W -> B×C×2H×2W, channels-last like PixelUnshuffle's output."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).unflatten(3, (-1, 2, 2))  # B×H×W×C×2×2
        return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def downsample(channels):
    """B×C×H×W -> B×2C×H/2×W/2."""
    return named(body=nn.Sequential(conv3x3(channels, channels // 2), PixelUnshuffle()))


def upsample(channels):
    """B×C×H×W -> B×C/2×2H×2W."""
    return named(body=nn.Sequential(conv3x3(channels, channels * 2), PixelShuffle()))


class LayerNorm(nn.Module):
    """Normalizes the channels of each pixel; both permutations are free for channels-last tensors."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x):
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Attention across channels, Restormer's MDTA (arXiv 2111.09881, Eq. 1). B×C×H×W -> B×C×H×W.

    The definition is project_out(v · softmax(temperature · q̂ᵀk̂)ᵀ), q̂ and k̂ having columns of length 1. Two steps move
    to the small C/heads×C/heads matrix, where they cost almost nothing: dividing by the lengths, and projecting.
    """

    def __init__(self, channels, heads):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = conv1x1(channels, channels * 3)
        self.qkv_dwconv = depthwise3x3(channels * 3)
        self.project_out = conv1x1(channels, channels)

    def forward(self, x):
        heads, (height, width) = len(self.temperature), x.shape[2:]
        qkv = self.qkv_dwconv(self.qkv(x)).permute(0, 2, 3, 1).flatten(1, 2)  # B×HW×3C, a view if x is channels-last
        q, k, v = qkv.chunk(3, dim=2)
        q, k = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))  # B×heads×HW×C/heads
        q_scale, k_scale = (t.float().square().sum(2).clamp_min(1e-24).rsqrt() for t in (q, k))  # B×heads×C/heads
        scores = (q.transpose(2, 3) @ k) * q_scale[..., None] * k_scale[..., None, :]
        attention = (scores * self.temperature).softmax(dim=3).to(v.dtype)  # B×heads×C/heads×C/heads
        project = self.project_out.weight.flatten(1).unflatten(1, (heads, -1))  # C×heads×C/heads
        project = torch.einsum("ohc,bhcd->bhdo", project, attention).flatten(1, 2)  # B×C×C
        return (v @ project).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    """Gated feed-forward network, Restormer's GDFN (arXiv 2111.09881, Eq. 2). B×C×H×W -> B×C×H×W."""

    def __init__(self, channels):
        super().__init__()
        hidden = int(2.66 * channels)
        self.project_in = conv1x1(channels, hidden * 2)
        self.dwconv = depthwise3x3(hidden * 2)
        self.project_out = conv1x1(hidden, channels)

    def forward(self, x):
        def branch(project, filters):
            return F.conv2d(F.conv2d(x, project), filters, padding=1, groups=len(filters))

        # The two halves are computed separately: slices of one channels-last tensor are slow to read.
        (gate_in, value_in), (gate, value) = self.project_in.weight.chunk(2), self.dwconv.main[0].weight.chunk(2)
        return self.project_out(F.gelu(branch(gate_in, gate)) * branch(value_in, value))


class TransformerBlock(nn.Module):
    """B×C×H×W -> B×C×H×W."""

    def __init__(self, channels, heads):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn = Attention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.ffn = FeedForward(channels)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class INR(nn.Module):
    """Implicit neural representation (Sec. 3.2): features B×dim×h×w -> image B×3×h×w.

    The published head feeds 3×3 neighbourhoods, 18 relative coordinates and the cell's size to an MLP, for four cells.
    The network queries it at pixel centres only, where coordinates are 0, sizes 2 and all answers equal. So it is a 3×3
    convolution, the size folded into its bias, followed by 1×1 ones; the first layer keeps its published width.
    """

    cells = 2  # number of the MLP's last inputs, the height and the width of a cell

    def __init__(self, dim, coordinates=18, hidden=256):
        super().__init__()
        layers = [nn.Linear(9 * dim + coordinates + self.cells, hidden), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.imnet = named(layers=nn.Sequential(*layers, nn.Linear(hidden, 3)))

    def first_layer(self, x, bias=None):
        """The MLP's first layer on the 3×3 neighbourhoods alone: B×dim×h×w -> B×hidden×h×w."""
        kernel = self.imnet.layers[0].weight[:, : 9 * x.shape[1]].unflatten(1, (-1, 3, 3))
        return F.conv2d(x, kernel, bias, padding=1)

    def forward(self, x):
        first, rest = self.imnet.layers[0], self.imnet.layers[1:]
        hidden = self.first_layer(x, first.bias + 2 * first.weight[:, -self.cells :].sum(dim=1))
        return rest(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """BFPU (Sec. 3.3, Fig. 3): two latents B×C×h×w -> one. Gated latents are added; the figure concatenates them."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = conv3x3(channels, channels, bias=True)
        self.key_conv = conv3x3(channels, channels, bias=True)
        self.gamma1 = conv3x3(channels * 2, 2, bias=True)
        self.gamma2 = conv3x3(channels * 2, 2, bias=True)

    def forward(self, x, y):
        similarity = torch.sigmoid(self.query_conv(x) * self.key_conv(y))
        return self.gated(x, similarity, self.gamma1) + self.gated(y, similarity, self.gamma2)

    @staticmethod
    def gated(x, similarity, gamma):
        attended = x * similarity
        gates = gamma(torch.cat([x, attended], dim=1))
        return x * gates[:, :1] + attended * gates[:, 1:]


class UShape:
    """One U-shaped pass over a scale: a view, set by add_scale, of parts that the network owns under their published
    names. Replacing a part of the network by assignment leaves the view stale."""

    def encode(self, x):
        """Features B×C×h×w -> latent B×4C×h/4×w/4, and the skips."""
        skip1 = self.encoder_level1(x)
        skip2 = self.encoder_level2(self.down1_2(skip1))
        return self.latent(self.down2_3(skip2)), (skip1, skip2)

    def decode(self, latent, skips):
        """Latent B×4C×h/4×w/4 and skips -> features B×C×h×w."""
        skip1, skip2 = skips
        x = self.reduce_chan_level2(torch.cat([self.up3_2(latent), skip2], dim=1))
        x = self.reduce_chan_level1(torch.cat([self.up2_1(self.decoder_level2(x)), skip1], dim=1))
        return self.decoder_level1(x)


def add_scale(net, scale, passes, dim, blocks):
    """Registers the parts of a scale with the network, in the published order -> a UShape for each pass.

    Published names end in the number of the pass: those of resampling layers from pass 2 on (`up2_1_max`,
    `up2_1_max2`), all others where a scale has several passes (`latent_small`, `latent_mid1`).
    """
    resampling = ("down1_2", "down2_3", "up3_2", "up2_1")
    parts = {
        "encoder_level1": lambda: blocks(0),
        "down1_2": lambda: downsample(dim),
        "encoder_level2": lambda: blocks(1),
        "down2_3": lambda: downsample(dim * 2),
        "latent": lambda: blocks(2),
        "up3_2": lambda: upsample(dim * 4),
        "reduce_chan_level2": lambda: conv1x1(dim * 4, dim * 2),
        "decoder_level2": lambda: blocks(1),
        "up2_1": lambda: upsample(dim * 2),
        "reduce_chan_level1": lambda: conv1x1(dim * 2, dim),
        "decoder_level1": lambda: blocks(0),
    }
    shapes = [UShape() for _ in range(passes)]
    net.add_module(f"patch_embed_{scale}", named(proj=conv3x3(3, dim)))
    for part, build in parts.items():
        for number, shape in enumerate(shapes, 1):
            module = build()
            numbered = number > 1 if part in resampling else passes > 1
            net.add_module(f"{part}_{scale}{number if numbered else ''}", module)
            setattr(shape, part, module)
    net.add_module(f"output_{scale}", conv3x3(dim, 3))
    for number in range(1, passes):  # lead from one pass to the next
        net.add_module(f"output_{scale}_context{number if passes > 2 else ''}", conv3x3(dim, dim))
    return shapes


class MultiscaleNet(nn.Module):
    """The network of Figure 2: RGB in [0, 1], B×3×H×W with H and W multiples of 16 -> a list of seven images.

    The scales small (1/4 size), mid (1/2) and max (full) have 1, 2 and 3 passes. The list: [0] the derained image, [1]
    at 1/2 size, [2] at 1/4 size, [3] the mid scale's input with what its INR renders, [4] the mid scale's input, halved
    in value, [5] as [3] of the small scale, [6] the 1/4 input. Losses and scripts, published ones too, rely on this
    order. Results are not clamped.

    Args:
        dim: channels at the finest level, 48 for NeRD-Rain and 32 for NeRD-Rain-S; ×2 and ×4 at the deeper ones
        num_blocks: blocks at level 1, level 2 and the latent
        heads: attention heads at the same three places
    """

    def __init__(self, dim=48, num_blocks=(2, 3, 3), heads=(1, 2, 4)):
        super().__init__()
        self.options = {"dim": dim, "num_blocks": tuple(num_blocks), "heads": tuple(heads)}

        def blocks(level):
            return nn.Sequential(*(TransformerBlock(dim * 2**level, heads[level]) for _ in range(num_blocks[level])))

        (self.small,) = add_scale(self, "small", 1, dim, blocks)
        self.INR = INR(dim)
        self.mid1, self.mid2 = add_scale(self, "mid", 2, dim, blocks)
        self.INR2 = INR(dim)
        self.max1, self.max2, self.max3 = add_scale(self, "max", 3, dim, blocks)
        self.BF1, self.BF2, self.BF3 = (Fusion(dim * 4) for _ in range(3))
        self.upsmall2mid1, self.upsmall2mid2 = upsample(dim * 4), upsample(dim * 2)
        self.upmid2max1, self.upmid2max2 = upsample(dim * 4), upsample(dim * 2)

        # As published, pass 3 uses a layer of pass 2. Its own is stored but unused: DDP would wait for its gradient.
        self.max3.reduce_chan_level1 = self.reduce_chan_level1_max2
        self.reduce_chan_level1_max3.requires_grad_(False)

    def forward(self, x):
        if x.shape[-2] % MULTIPLE or x.shape[-1] % MULTIPLE:
            raise ValueError(f"height and width must be multiples of {MULTIPLE}, not {x.shape[-2]} and {x.shape[-1]}")
        rainy_small, rainy_mid, rainy_max = resize(x, 1 / 4), resize(x, 1 / 2), x

        # Coarse to fine: from a scale's first latent an INR renders a residual; image and residual join the next input.
        z_small, skips_small = self.small.encode(self.patch_embed_small(rainy_small))
        rendered_small = self.INR(self.upsmall2mid2(self.upsmall2mid1(z_small))) + rainy_small
        image_mid = rainy_mid + resize(rendered_small, 2)
        z_mid1, skips_mid1 = self.mid1.encode(self.patch_embed_mid(image_mid))
        rendered_mid = self.INR2(self.upmid2max2(self.upmid2max1(z_mid1))) + image_mid
        image_max = rainy_max + resize(rendered_mid, 2)

        # The passes of the full-size scale; a context convolution leads from one to the next.
        z_max1, skips = self.max1.encode(self.patch_embed_max(image_max))
        y = self.max1.decode(z_max1, skips)
        z_max2, skips = self.max2.encode(self.output_max_context1(y))
        y = self.max2.decode(z_max2, skips)
        z_max3, skips_max3 = self.max3.encode(self.output_max_context2(y))

        # Fine to coarse: the encoders' latents of two neighbouring passes are fused and fed back to the coarser scale.
        feedback_mid1 = resize(self.BF1(z_max1, z_max2), 1 / 2)
        feedback_mid2 = resize(self.BF2(z_max2, z_max3), 1 / 2)
        y = self.mid1.decode(z_mid1 + feedback_mid1, skips_mid1)
        z_mid2, skips_mid2 = self.mid2.encode(self.output_mid_context(y))
        feedback_small = resize(self.BF3(z_mid1, z_mid2), 1 / 2)

        # Coarse to fine again: each scale decodes its last pass and hands its features up.
        y_small = self.small.decode(z_small + feedback_small, skips_small)
        y_mid = self.mid2.decode(z_mid2 + feedback_mid2, skips_mid2) + resize(y_small, 2)
        y_max = self.max3.decode(z_max3, skips_max3) + resize(y_mid, 2)
        derained_small = self.output_small(y_small) + rainy_small
        derained_mid = self.output_mid(y_mid) + rainy_mid
        derained_max = self.output_max(y_max) + rainy_max
        return [derained_max, derained_mid, derained_small, rendered_mid, image_mid / 2, rendered_small, rainy_small]
