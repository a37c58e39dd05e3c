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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SCALES = ("small", "mid", "max")  # 1/4, 1/2 and full size (Fig. 2)
MULTIPLE = 16  # the small scale works at 1/4 size and halves that twice
HEADS = {"small": "INR", "mid": "INR2", "max": "INR3"}  # published names of the INR heads
UPS = {"small": "upsmall2mid", "mid": "upmid2max"}  # and of what enlarges a latent for them
INRS = {  # kind of implicit neural representation -> scales that have a head
    "published": ("small", "mid"),
    "coordinate": ("small", "mid"),  # renders at the next scale's size, by coordinates (CoordinateINR)
    "coordinate_random": ("small", "mid"),  # and is trained on its colours at random positions
    "none": (),
    "first": ("small",),  # the full-size scale gets nothing from the mid scale
    "no_encoding": ("small", "mid"),  # without periodic encoding
    "no_ensemble": ("small", "mid"),  # without local ensemble: the same function, as all four answers are one
    "own_encoder": ("small", "mid"),  # the heads read an encoder of their own, not the scale's
    "own_embedding": ("small", "mid", "max"),  # each scale's head adds to its own image, from an embedding of its own
}
FEEDBACKS = ("bfpu", "sum", "none")


class Points(NamedTuple):
    """Colours B×3×N of a picture at N positions, N×2 as (row, column) in [-1, 1]: pixel i of n has its centre at
    c_i = -1 + (2i + 1)/n."""

    colours: torch.Tensor
    positions: torch.Tensor

    def colours_of(self, image, mode="bilinear"):
        """The colours B×3×N of another picture B×3×H×W at the same positions."""
        grid = self.positions.flip(1).expand(len(image), 1, -1, 2)  # grid_sample takes (column, row)
        return F.grid_sample(image, grid, mode, padding_mode="border", align_corners=False).squeeze(2)


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

    Args:
        dim: channels of the features
        encoding: whether the coordinates come with their periodic encoding (octaves 0 to 3, sine and cosine)
        ensemble: whether the four nearest cells answer; it makes a difference to CoordinateINR only
    """

    octaves, cells = 4, 2  # cells: their height and width

    def __init__(self, dim, encoding=True, ensemble=True, hidden=256):
        super().__init__()
        self.encoding, self.ensemble = encoding, ensemble
        coordinates = 2 + (2 * 2 * self.octaves if encoding else 0)
        widths = [9 * dim + coordinates + self.cells, hidden, hidden, hidden]
        layers = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.imnet = named(layers=nn.Sequential(*layers, nn.Linear(hidden, 3)))

    def neighbourhoods(self, x, bias=None):
        """What the MLP's first layer makes of the 3×3 features around each pixel: B×dim×h×w -> B×hidden×h×w."""
        kernel = self.imnet.layers[0].weight[:, : 9 * x.shape[1]].unflatten(1, (-1, 3, 3))
        return F.conv2d(x, kernel, bias, padding=1)

    def forward(self, x):
        first, rest = self.imnet.layers[0], self.imnet.layers[1:]
        hidden = self.neighbourhoods(x, first.bias + 2 * first.weight[:, -self.cells :].sum(dim=1))
        return rest(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CoordinateINR(INR):
    """The representation that the paper describes (Sec. 3.2, Fig. 2), as in LIIF (arXiv 2012.09161): features
    B×dim×h×w -> image B×3×H×W of any size, or its colours at any points.

    Positions run from -1 to 1 along each side, c_i = -1 + (2i + 1)/n being the centre of pixel i of n. A point p asks
    the four feature cells t in whose midst it lies, by their centres v_t:

        answer_t = MLP(3×3 features at v_t, (p - v_t)·(h, w), γ(p) - γ(v_t), (2/H, 2/W)·(h, w))
        γ(p) = sin(2^l π p), cos(2^l π p) for l = 0 … 3 and both coordinates

    and blends them with the areas of the rectangles between p and the opposite cell's centre. At the centres of the
    features' own grid that is what INR computes; the coordinates matter between them.
    """

    def encoded(self, positions):
        """γ: N×2 -> N×16."""
        angles = positions[..., None] * (torch.pi * 2.0 ** torch.arange(self.octaves, device=positions.device))
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)

    def query(self, x, positions, cell):
        """B×dim×h×w, points N×2 as (row, column) in [-1, 1], size of the pixels asked for in the same units
        -> B×3×N."""
        first, rest = self.imnet.layers[0], self.imnet.layers[1:]
        hidden = self.neighbourhoods(x).flatten(2)  # linear, so that it can be computed once for all points
        by_coordinates = first.weight[:, 9 * x.shape[1] :]
        size, cell = (torch.tensor(values, device=x.device) for values in (x.shape[2:], cell))
        places = (positions + 1) / 2 * size - 0.5  # in cells: the centre of cell i lies at i
        colours = 0
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)) if self.ensemble else ((0.5, 0.5),):
            there = (places + torch.tensor(corner, device=x.device)).floor()  # the cell below, above, or the nearest
            area = (1 - (places - there).abs()).prod(dim=1) if self.ensemble else torch.ones_like(places[:, 0])
            inside = there.clamp(torch.zeros_like(size), size - 1)
            centre = -1 + (2 * inside + 1) / size
            inputs = [(positions - centre) * size, (cell * size).expand_as(centre)]
            if self.encoding:
                inputs.insert(1, self.encoded(positions) - self.encoded(centre))
            at_cell = hidden[:, :, (inside[:, 0] * size[1] + inside[:, 1]).long()].transpose(1, 2)  # B×N×hidden
            answer = rest(at_cell + F.linear(torch.cat(inputs, dim=1), by_coordinates, first.bias))
            colours = colours + answer * area[:, None]
        return colours.transpose(1, 2)

    def forward(self, x, size):
        """Renders at `size` (H, W)."""
        rows, columns = (-1 + (2 * torch.arange(n, device=x.device) + 1) / n for n in size)
        positions = torch.cartesian_prod(rows, columns)
        return self.query(x, positions, (2 / size[0], 2 / size[1])).unflatten(2, size)


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


class Sum(nn.Module):
    """In place of Fusion, for an ablation."""

    def forward(self, x, y):
        return x + y


class Stages(NamedTuple):
    """What the way from coarse to fine leaves, each by scale."""

    images: dict  # input images with what the coarser scale rendered
    renderings: dict  # of the INR heads
    enlarged: dict  # latents enlarged to the image's size, which heads read
    first: dict  # latents and skips of the first pass


class MultiscaleNet(nn.Module):
    """The whole network (Fig. 2): RGB in [0, 1], B×3×H×W with H and W multiples of 16 -> a list of seven tensors.

    [0] derained image, [1] at 1/2 size, [2] at 1/4 size, [3] INR rendering of the mid scale, [4] half the values of the
    mid scale's input image, [5] INR rendering of the small scale, [6] 1/4 input. The published losses and scripts rely
    on this order. Renderings have the size of their scale, coordinate ones of the next. What an ablation leaves away
    is None. Results are not clamped.

    Args:
        dim: width C at the finest level; 2C and 4C below it.
        num_blocks: blocks at level 1, level 2 and the latent.
        heads: attention heads at the same three places; None builds NeRD-Rain-MPRNet's blocks (Table 6), which are
            two channel-attention blocks each.
        passes: over the images at 1/4, 1/2 and full size; the first may be 0.
        inr: one of INRS, see there.
        feedback: "bfpu", as published; "sum" adds two latents instead of fusing them; "none".
        own_reduce: pass 3 of the full-size scale uses its own layer reduce_chan_level1_max3, not pass 2's.
        antialias: the inputs at 1/2 and 1/4 size are means of 2×2 and 4×4 pixels instead of the first of them.
    """

    def __init__(
        self,
        dim=48,
        num_blocks=(2, 3, 3),
        heads=(1, 2, 4),
        passes=(1, 2, 3),
        inr="published",
        feedback="bfpu",
        own_reduce=False,
        antialias=False,
    ):
        super().__init__()
        if inr not in INRS or feedback not in FEEDBACKS or len(passes) != 3 or passes[0] < 0 or min(passes[1:]) < 1:
            raise ValueError(
                f"inr is one of {', '.join(INRS)}, feedback one of {', '.join(FEEDBACKS)}, passes are three numbers of "
                f"which the first may be 0; not {inr}, {feedback} and {passes}"
            )
        self.options = {
            "dim": dim,
            "num_blocks": tuple(num_blocks),
            "heads": heads and tuple(heads),
            "passes": tuple(passes),
            "inr": inr,
            "feedback": feedback,
            "own_reduce": own_reduce,
            "antialias": antialias,
        }
        self.passes, self.inr = dict(zip(SCALES, passes)), inr
        prelu = nn.PReLU() if heads is None else None  # a single slope, shared by the whole network

        def block(level):
            width = dim * 2**level
            if heads:
                return TransformerBlock(width, heads[level])
            return named(decoder_level1=nn.Sequential(*(ChannelAttentionBlock(width, prelu) for _ in range(2))))

        def blocks(level):
            return nn.Sequential(*(block(level) for _ in range(num_blocks[level])))

        encoder = {
            "encoder_level1": lambda: blocks(0),
            "down1_2": lambda: downsample(dim),
            "encoder_level2": lambda: blocks(1),
            "down2_3": lambda: downsample(dim * 2),
            "latent": lambda: blocks(2),
        }
        parts = encoder | {
            "up3_2": lambda: upsample(dim * 4),
            "reduce_chan_level2": lambda: conv1x1(dim * 4, dim * 2),
            "decoder_level2": lambda: blocks(1),
            "up2_1": lambda: upsample(dim * 2),
            "reduce_chan_level1": lambda: conv1x1(dim * 2, dim),
            "decoder_level1": lambda: blocks(0),
        }
        scales = [scale for scale in SCALES if self.passes[scale]]
        rendering = [scale for scale in INRS[inr] if scale in scales]  # scales with an INR head
        for scale in scales:
            self.add_module(f"patch_embed_{scale}", named(proj=conv3x3(3, dim)))
            for part, build in parts.items():
                for k in range(1, self.passes[scale] + 1):
                    self.add_module(self.part_name(part, scale, k), build())
            self.add_module(f"output_{scale}", conv3x3(dim, 3))
            for k in range(1, self.passes[scale]):
                self.add_module(self.context_name(scale, k), conv3x3(dim, dim))
            if scale in rendering:
                head = CoordinateINR if inr.startswith("coordinate") else INR
                head = head(dim, encoding=inr != "no_encoding", ensemble=inr != "no_ensemble")
                self.add_module(HEADS[scale], head)
        for number, _ in enumerate(self.fused_passes() if feedback != "none" else (), 1):
            self.add_module(f"BF{number}", Fusion(dim * 4) if feedback == "bfpu" else Sum())
        for scale in rendering:
            if inr == "own_embedding":
                self.add_module(f"{HEADS[scale]}_embed", conv3x3(3, dim))
                continue
            for number, width in enumerate((dim * 4, dim * 2), 1):
                self.add_module(f"{UPS[scale]}{number}", upsample(width))
            if inr == "own_encoder":
                own = nn.Sequential(*(build() for build in encoder.values()))
                self.add_module(f"{HEADS[scale]}_encoder", own)
        if self.passes["max"] >= 3 and not own_reduce:
            # Stored in every checkpoint but never used (see decode): no gradient, or DistributedDataParallel waits.
            self.reduce_chan_level1_max3.requires_grad_(False)

    def part_name(self, part, scale, k):
        """Published name of a part of pass `k` (from 1) of a scale: resampling is numbered from the second pass on,
        all other parts where the scale has several passes."""
        numbered = k > 1 if part in ("down1_2", "down2_3", "up3_2", "up2_1") else self.passes[scale] > 1
        return f"{part}_{scale}{k if numbered else ''}"

    def context_name(self, scale, k):
        """Published name of the convolution between pass `k` and the next: numbered where a scale has several."""
        return f"output_{scale}_context{k if self.passes[scale] > 2 else ''}"

    def fused_passes(self):
        """The feedback units BF1, BF2, … as (scale, k): what pass `k` of a scale gets from passes k and k + 1 of the
        finer one."""
        pairs = (("mid", "max"), ("small", "mid"))
        return [(to, k) for to, of in pairs for k in range(1, min(self.passes[of] - 1, self.passes[to]) + 1)]

    def part(self, name, scale, k):
        return getattr(self, self.part_name(name, scale, k))

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
        # The published network uses pass 2's layer in pass 3, too.
        reducer = 2 if (scale, k) == ("max", 3) and not self.options["own_reduce"] else k
        return self.part("decoder_level1", scale, k)(self.part("reduce_chan_level1", scale, reducer)(x))

    def inputs(self, x):
        """The rainy image at each scale's size."""
        factors = {"small": 4, "mid": 2, "max": 1}
        reduce = F.avg_pool2d if self.options["antialias"] else lambda x, factor: resize(x, 1 / factor)
        return {scale: x if factor == 1 else reduce(x, factor) for scale, factor in factors.items()}

    def render(self, scale, image, features, size):
        """What the INR head of a scale makes of its image and features, B×3×size; but for coordinate heads the size is
        the image's."""
        head = getattr(self, HEADS[scale])
        if isinstance(head, CoordinateINR):
            return head(features, size) + F.interpolate(image, size, mode="nearest")
        return head(features) + image

    def render_points(self, scale, image, features, size):
        """The same at as many random positions as a picture of that size has pixels -> Points."""
        points = Points(None, torch.rand(size[0] * size[1], 2).to(image) * 2 - 1)
        colours = getattr(self, HEADS[scale]).query(features, points.positions, (2 / size[0], 2 / size[1]))
        return points._replace(colours=colours + points.colours_of(image, mode="nearest"))

    def render_image(self, x, scale, size):
        """What the coordinate head of a scale, "small" or "mid", renders for a rainy image, at any size (H, W)."""
        stages = self.coarse_to_fine(self.inputs(x))
        return self.render(scale, stages.images[scale], stages.enlarged[scale], size)

    def coarse_to_fine(self, inputs):
        """Each scale's first latent is rendered and added to the next scale's image -> Stages."""
        stages, passed_on = Stages({}, {}, {}, {}), 0
        for scale in (scale for scale in SCALES if self.passes[scale]):
            image, passed_on = inputs[scale] + passed_on, 0
            stages.images[scale] = image
            size = tuple(image.shape[2:])
            if self.inr == "own_embedding":
                features = getattr(self, f"{HEADS[scale]}_embed")(image)
                stages.renderings[scale] = image = self.render(scale, image, features, size)
            embedded = getattr(self, f"patch_embed_{scale}")(image)
            stages.first[scale] = self.encode(embedded, scale, 1)
            if self.inr == "own_embedding" or not hasattr(self, HEADS[scale]):
                continue
            own_encoder = getattr(self, f"{HEADS[scale]}_encoder", None)
            latent = own_encoder(embedded) if own_encoder else stages.first[scale][0]
            features = getattr(self, f"{UPS[scale]}2")(getattr(self, f"{UPS[scale]}1")(latent))
            stages.enlarged[scale] = features
            if self.inr.startswith("coordinate"):
                size = (size[0] * 2, size[1] * 2)
                passed_on = stages.renderings[scale] = self.render(scale, image, features, size)
                if self.inr == "coordinate_random" and self.training:
                    stages.renderings[scale] = self.render_points(scale, image, features, size)
            else:
                stages.renderings[scale] = self.render(scale, image, features, size)
                passed_on = resize(stages.renderings[scale], 2)
        return stages

    def all_passes(self, scale, first, finer):
        """The passes over a scale: its first latent and skips, and the latents of the finer scale's passes -> features
        B×C×h×w, and the latents of all passes as they were before anything was fed back to them."""
        (latent, skips), latents = first, []
        for k in range(1, self.passes[scale] + 1):
            latents.append(latent)
            if (scale, k) in self.fused_passes() and self.options["feedback"] != "none":
                fusion = getattr(self, f"BF{self.fused_passes().index((scale, k)) + 1}")
                latent = latent + resize(fusion(finer[k - 1], finer[k]), 0.5)
            features = self.decode(latent, skips, scale, k)
            if k < self.passes[scale]:
                latent, skips = self.encode(getattr(self, self.context_name(scale, k))(features), scale, k + 1)
        return features, latents

    def forward(self, x):
        if x.shape[-2] % MULTIPLE or x.shape[-1] % MULTIPLE:
            raise ValueError(f"height and width must be multiples of {MULTIPLE}, not {x.shape[-2]} and {x.shape[-1]}")
        inputs = self.inputs(x)
        images, renderings, _, first = self.coarse_to_fine(inputs)

        # Fine to coarse: latents of two neighbouring passes are fused and fed back to the coarser scale.
        features, latents = {}, ()
        for scale in reversed(first):
            features[scale], latents = self.all_passes(scale, first[scale], latents)

        # Coarse to fine again: decoded features are handed up, and each scale predicts its residual.
        results, handed_up = {}, 0
        for scale in first:
            decoded = features[scale] + handed_up
            results[scale] = getattr(self, f"output_{scale}")(decoded) + inputs[scale]
            handed_up = resize(decoded, 2)
        return [
            results["max"],
            results["mid"],
            results.get("small"),
            renderings.get("mid"),
            images["mid"] / 2,
            renderings.get("small"),
            images.get("small"),
        ]


def checkpoint_activations(net):
    """Lets a network forget what is inside its blocks and compute it again when gradients ask for it: training then
    takes less memory and a third more time."""
    for module in net.modules():
        if isinstance(module, (TransformerBlock, ChannelAttentionBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return net


def nerd_rain(**options):
    """NeRD-Rain: 22,893,146 parameters. Options are those of MultiscaleNet."""
    return MultiscaleNet(**{"dim": 48} | options)


def nerd_rain_s(**options):
    """NeRD-Rain-S: 10,530,314 parameters."""
    return MultiscaleNet(**{"dim": 32} | options)


def nerd_rain_mprnet(**options):
    """NeRD-Rain-MPRNet (Table 6): 22,983,411 parameters."""
    return MultiscaleNet(**{"dim": 48, "num_blocks": (1, 1, 1), "heads": None} | options)


NETWORKS = {"NeRD-Rain": nerd_rain, "NeRD-Rain-S": nerd_rain_s, "NeRD-Rain-MPRNet": nerd_rain_mprnet}  # the paper's
NETWORK_NAMES = tuple(build.__name__ for build in NETWORKS.values())  # as options name them
