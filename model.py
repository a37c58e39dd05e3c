"""NeRD-Rain: bidirectional multi-scale implicit neural representations for image deraining.

X. Chen, J. Pan, J. Dong, CVPR 2024, https://arxiv.org/abs/2404.01547.

Three scales see the rainy image at 1/4, 1/2 and full size and pass over it 1, 2 and 3 times. Every pass is a
U-shaped encoder-decoder of transformer blocks. From coarse to fine, implicit neural representation (INR) heads
render the image of the next scale's input; from fine to coarse, fused latents are fed back.

Modules are registered under the names of the published code and in its order, so that released weights load with
`strict=True`, a published optimizer state continues, and a seed gives the same initial weights.
"""

from collections import OrderedDict
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PASSES = {"small": 1, "mid": 2, "max": 3}  # scale -> passes over its image; coarse to fine (Fig. 2)
MULTIPLE = 16  # the small scale works at 1/4 size and halves that twice


def resize(x, factor):
    """Nearest-neighbour resizing, the only kind inside the network."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")


def named(**modules):
    """A sequence whose children have names: the published code wraps many single layers in a module."""
    return nn.Sequential(OrderedDict(modules))


def conv3x3(inputs, outputs, bias=False):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def conv1x1(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def depthwise3x3(channels):
    return named(main=nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)))


def downsample(channels):
    """B×C×H×W -> B×2C×H/2×W/2."""
    return named(body=nn.Sequential(conv3x3(channels, channels // 2), nn.PixelUnshuffle(2)))


def upsample(channels):
    """B×C×H×W -> B×C/2×2H×2W."""
    return named(body=nn.Sequential(conv3x3(channels, channels * 2), nn.PixelShuffle(2)))


class LayerNorm(nn.Module):
    """Normalises the channels of each pixel; on channels-last tensors both permutations are free."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x):
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Channel attention: the MDTA of Restormer (arXiv 2111.09881, Eq. 1). B×C×H×W -> B×C×H×W."""

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
        # Dividing the small matrix by the norms equals normalising q and k, with the same bound of 1e-12.
        q_scale, k_scale = (t.float().square().sum(2).clamp_min(1e-24).rsqrt() for t in (q, k))  # B×heads×C/heads
        scores = (q.transpose(2, 3) @ k) * q_scale[..., None] * k_scale[..., None, :]
        attention = (scores * self.temperature).softmax(dim=3).to(v.dtype)  # B×heads×C/heads×C/heads
        # project_out(attention @ v) as one product per pixel: the weights take in the attention.
        project = self.project_out.weight.flatten(1).unflatten(1, (heads, -1))  # C×heads×C/heads
        project = torch.einsum("ohc,bhcd->bhdo", project, attention).flatten(1, 2)  # B×C×C
        return (v @ project).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    """Gated feed-forward network: the GDFN of Restormer (arXiv 2111.09881, Eq. 2). B×C×H×W -> B×C×H×W."""

    def __init__(self, channels):
        super().__init__()
        hidden = int(2.66 * channels)
        self.project_in = conv1x1(channels, hidden * 2)
        self.dwconv = depthwise3x3(hidden * 2)
        self.project_out = conv1x1(hidden, channels)

    def forward(self, x):
        halves = zip(self.project_in.weight.chunk(2), self.dwconv.main[0].weight.chunk(2))
        gate, value = (  # one after the other: slices of one tensor are slow to read where channels come last
            F.conv2d(F.conv2d(x, project), filters, padding=1, groups=len(filters)) for project, filters in halves
        )
        return self.project_out(F.gelu(gate) * value)


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


class ChannelAttention(nn.Module):
    """Scales each channel by a gate computed from its mean (MPRNet, arXiv 2102.02808)."""

    def __init__(self, channels):
        super().__init__()
        self.conv_du = nn.Sequential(
            conv1x1(channels, channels // 4), nn.ReLU(), conv1x1(channels // 4, channels), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))


class ChannelAttentionBlock(nn.Module):
    """CAB of MPRNet (arXiv 2102.02808, Fig. 3). B×C×H×W -> B×C×H×W."""

    def __init__(self, channels, activation):
        super().__init__()
        body = nn.Sequential(conv3x3(channels, channels), activation, conv3x3(channels, channels))
        self.CA = ChannelAttention(channels)  # registered first, but initialised after the body, as published
        self.body = body

    def forward(self, x):
        return x + self.CA(self.body(x))


class INR(nn.Module):
    """Implicit neural representation head (Sec. 3.2): features B×dim×h×w -> image B×3×h×w.

    The published head unfolds 3×3 neighbourhoods and asks a pixel-wise MLP four times (local ensemble), with 18
    relative coordinates and 2 cell sizes as further inputs. It asks only at the centres of the features' own grid,
    where every relative coordinate is 0 and every cell 2. All four answers are therefore one and the same 3×3
    convolution, its bias shifted by the constant cell, followed by 1×1 convolutions. That is what is computed here,
    once; the weights keep their published shape.
    """

    coordinates, cells = 18, 2  # 2 coordinates with 16 periodic encodings; cell height and width

    def __init__(self, dim, hidden=256):
        super().__init__()
        widths = [9 * dim + self.coordinates + self.cells, hidden, hidden, hidden]
        layers = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.imnet = named(layers=nn.Sequential(*layers, nn.Linear(hidden, 3)))

    def forward(self, x):
        first, rest = self.imnet.layers[0], self.imnet.layers[1:]
        kernel = first.weight[:, : 9 * x.shape[1]].unflatten(1, (-1, 3, 3))
        bias = first.bias + 2 * first.weight[:, -self.cells :].sum(dim=1)
        hidden = F.conv2d(x, kernel, bias, padding=1)
        return rest(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """BFPU (Sec. 3.3, Fig. 3): two latents B×C×h×w -> one. The figure concatenates, the published network sums."""

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


def part_name(part, scale, k):
    """Published name of a part of pass `k` (from 1) of a scale: resampling is numbered from the second pass on,
    all other parts where the scale has several passes."""
    numbered = k > 1 if part in ("down1_2", "down2_3", "up3_2", "up2_1") else PASSES[scale] > 1
    return f"{part}_{scale}{k if numbered else ''}"


def context_name(scale, k):
    """Published name of the convolution between pass `k` and the next: numbered where a scale has several."""
    return f"output_{scale}_context{k if PASSES[scale] > 2 else ''}"


class MultiscaleNet(nn.Module):
    """The whole network (Fig. 2): RGB in [0, 1], B×3×H×W with H and W multiples of 16 -> a list of seven tensors.

    [0] derained image, [1] at 1/2 size, [2] at 1/4 size, [3] INR rendering at 1/2 size, [4] half the values of the
    mid scale's input image, [5] INR rendering at 1/4 size, [6] 1/4 input. The published losses and scripts rely on
    this order. Results are not clamped.

    Args:
        dim: width C at the finest level; 2C and 4C below it.
        num_blocks: blocks at level 1, level 2 and the latent.
        heads: attention heads at the same three places; None builds NeRD-Rain-MPRNet's blocks (Table 6), which are
            two channel-attention blocks each.
    """

    def __init__(self, dim=48, num_blocks=(2, 3, 3), heads=(1, 2, 4)):
        super().__init__()
        self.options = {"dim": dim, "num_blocks": tuple(num_blocks), "heads": heads and tuple(heads)}
        prelu = nn.PReLU() if heads is None else None  # a single slope, shared by the whole network

        def block(level):
            width = dim * 2**level
            if heads:
                return TransformerBlock(width, heads[level])
            return named(decoder_level1=nn.Sequential(*(ChannelAttentionBlock(width, prelu) for _ in range(2))))

        def blocks(level):
            return nn.Sequential(*(block(level) for _ in range(num_blocks[level])))

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
        for scale, passes in PASSES.items():
            self.add_module(f"patch_embed_{scale}", named(proj=conv3x3(3, dim)))
            for part, build in parts.items():
                for k in range(1, passes + 1):
                    self.add_module(part_name(part, scale, k), build())
            self.add_module(f"output_{scale}", conv3x3(dim, 3))
            for k in range(1, passes):
                self.add_module(context_name(scale, k), conv3x3(dim, dim))
            if scale == "small":
                self.INR = INR(dim)
            elif scale == "mid":
                self.INR2 = INR(dim)
        self.BF1, self.BF2, self.BF3 = (Fusion(dim * 4) for _ in range(3))
        self.upsmall2mid1, self.upsmall2mid2 = upsample(dim * 4), upsample(dim * 2)
        self.upmid2max1, self.upmid2max2 = upsample(dim * 4), upsample(dim * 2)
        # Stored in every checkpoint but never used (see decode): no gradient, or DistributedDataParallel waits for it.
        self.reduce_chan_level1_max3.requires_grad_(False)

    def encode(self, x, scale, k):
        """First half of pass `k`: features B×C×h×w -> latent B×4C×h/4×w/4 and the two skips."""
        skip1 = self.part("encoder_level1", scale, k)(x)
        skip2 = self.part("encoder_level2", scale, k)(self.part("down1_2", scale, k)(skip1))
        latent = self.part("latent", scale, k)(self.part("down2_3", scale, k)(skip2))
        return latent, (skip1, skip2)

    def decode(self, latent, skips, scale, k):
        """Second half of pass `k`: latent B×4C×h/4×w/4 and the skips -> features B×C×h×w."""
        skip1, skip2 = skips
        x = torch.cat([self.part("up3_2", scale, k)(latent), skip2], dim=1)
        x = self.part("decoder_level2", scale, k)(self.part("reduce_chan_level2", scale, k)(x))
        x = torch.cat([self.part("up2_1", scale, k)(x), skip1], dim=1)
        reducer = 2 if (scale, k) == ("max", 3) else k  # the published network uses pass 2's layer in pass 3, too
        return self.part("decoder_level1", scale, k)(self.part("reduce_chan_level1", scale, reducer)(x))

    def part(self, name, scale, k):
        return getattr(self, part_name(name, scale, k))

    def context(self, x, scale, k):
        return getattr(self, context_name(scale, k))(x)

    def forward(self, x):
        if x.shape[-2] % MULTIPLE or x.shape[-1] % MULTIPLE:
            raise ValueError(f"height and width must be multiples of {MULTIPLE}, not {x.shape[-2]} and {x.shape[-1]}")
        half, quarter = resize(x, 0.5), resize(x, 0.25)

        # Coarse to fine: each scale's first latent is rendered and added to the next scale's image.
        small, small_skips = self.encode(self.patch_embed_small(quarter), "small", 1)
        inr_small = self.INR(self.upsmall2mid2(self.upsmall2mid1(small))) + quarter
        image_mid = half + resize(inr_small, 2)
        mid1, mid1_skips = self.encode(self.patch_embed_mid(image_mid), "mid", 1)
        inr_mid = self.INR2(self.upmid2max2(self.upmid2max1(mid1))) + image_mid

        # The full-size scale: three passes in a row.
        max1, skips = self.encode(self.patch_embed_max(x + resize(inr_mid, 2)), "max", 1)
        features = self.context(self.decode(max1, skips, "max", 1), "max", 1)
        max2, skips = self.encode(features, "max", 2)
        features = self.context(self.decode(max2, skips, "max", 2), "max", 2)
        max3, skips = self.encode(features, "max", 3)
        features_max = self.decode(max3, skips, "max", 3)

        # Fine to coarse: latents of two neighbouring passes are fused and fed back to the coarser scale.
        fed_back = mid1 + resize(self.BF1(max1, max2), 0.5)
        features = self.context(self.decode(fed_back, mid1_skips, "mid", 1), "mid", 1)
        mid2, mid2_skips = self.encode(features, "mid", 2)
        features_mid = self.decode(mid2 + resize(self.BF2(max2, max3), 0.5), mid2_skips, "mid", 2)
        features_small = self.decode(small + resize(self.BF3(mid1, mid2), 0.5), small_skips, "small", 1)

        # Coarse to fine again: decoded features are handed up, and each scale predicts its residual.
        features_mid = features_mid + resize(features_small, 2)
        features_max = features_max + resize(features_mid, 2)
        return [
            self.output_max(features_max) + x,
            self.output_mid(features_mid) + half,
            self.output_small(features_small) + quarter,
            inr_mid,
            image_mid / 2,
            inr_small,
            quarter,
        ]


def checkpoint_activations(net):
    """Lets a network forget what is inside its blocks and compute it again when gradients ask for it: training then
    takes less memory and a third more time."""
    for module in net.modules():
        if isinstance(module, (TransformerBlock, ChannelAttentionBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return net


def nerd_rain():
    """NeRD-Rain: 22,893,146 parameters."""
    return MultiscaleNet(dim=48)


def nerd_rain_s():
    """NeRD-Rain-S: 10,530,314 parameters."""
    return MultiscaleNet(dim=32)


def nerd_rain_mprnet():
    """NeRD-Rain-MPRNet (Table 6): 22,983,411 parameters."""
    return MultiscaleNet(dim=48, num_blocks=(1, 1, 1), heads=None)
