"""Presets of the network, the paper's ablations (Tables 4 to 6) and what lies beyond them, from the parts of model.py.

`AblationNet` writes the wiring of `MultiscaleNet` as loops, so that the numbers of passes can change. With DEFAULTS
it has the same weights and computes the same images. Outputs that an ablation omits are None.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import (
    INR,
    MULTIPLE,
    Fusion,
    MultiscaleNet,
    TransformerBlock,
    add_scale,
    conv1x1,
    conv3x3,
    downsample,
    named,
    resize,
    upsample,
)

SCALES = {"small": 4, "mid": 2, "max": 1}  # by how much the input is reduced
FINER = {"mid": "max", "small": "mid"}  # scale -> the one that feeds back to it
INR_NAMES = {"small": "INR", "mid": "INR2", "max": "INR3"}
UPSAMPLER_NAMES = {"small": "upsmall2mid", "mid": "upmid2max"}  # what enlarges a latent for a head
INRS = {  # kind of implicit neural representation -> scales that have a head
    "published": ("small", "mid"),
    "coordinate": ("small", "mid"),  # renders at the next scale's size (CoordinateINR)
    "coordinate_random": ("small", "mid"),  # the same, trained on its colours at random positions
    "none": (),
    "first": ("small",),
    "no_encoding": ("small", "mid"),  # relative coordinates without their periodic encoding
    "no_ensemble": ("small", "mid"),  # one nearest cell instead of four: for "published" the same function
    "own_encoder": ("small", "mid"),  # heads read an encoder of their own
    "own_embedding": ("small", "mid", "max"),  # a head adds to its own image, from an embedding of its own
}
FEEDBACKS = {"bfpu": Fusion, "sum": lambda channels: Sum(), "none": None}
NETWORKS = {  # the paper's
    "NeRD-Rain": {"dim": 48},  # 22,893,146 parameters
    "NeRD-Rain-S": {"dim": 32},  # 10,530,314
    "NeRD-Rain-MPRNet": {"dim": 48, "num_blocks": (1, 1, 1), "heads": None},  # 22,983,411; Table 6
}
ABLATIONS = {  # name -> options of AblationNet
    "published": {},
    **{f"passes_{'_'.join(map(str, passes))}": {"passes": passes} for passes in ((3, 2, 1), (2, 2, 2), (0, 2, 3))},
    **{f"inr_{kind}": {"inr": kind} for kind in INRS if kind != "published"},
    **{f"feedback_{kind}": {"feedback": kind} for kind in FEEDBACKS if kind != "bfpu"},
    "own_reduce": {"own_reduce": True},
    "antialias": {"antialias": True},
}
DEFAULTS = {"passes": (1, 2, 3), "inr": "published", "feedback": "bfpu", "own_reduce": False, "antialias": False}


class ChannelAttentionBlock(nn.Module):
    """CAB, the block of MPRNet (arXiv 2102.02808, Fig. 3). B×C×H×W -> B×C×H×W."""

    def __init__(self, channels, activation):
        super().__init__()
        body = nn.Sequential(conv3x3(channels, channels), activation, conv3x3(channels, channels))
        squeeze, excite = conv1x1(channels, channels // 4), conv1x1(channels // 4, channels)
        self.CA = named(conv_du=nn.Sequential(squeeze, nn.ReLU(), excite, nn.Sigmoid()))  # registered first, made last
        self.body = body

    def forward(self, x):
        y = self.body(x)
        return x + y * self.CA(y.mean(dim=(2, 3), keepdim=True))


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


class Points(NamedTuple):
    """Colours B×3×N of a picture at N positions, N×2 as (row, column) from -1 to 1."""

    colours: torch.Tensor
    positions: torch.Tensor

    def colours_of(self, image, mode="bilinear"):
        """The colours B×3×N of another picture B×3×H×W at the same positions."""
        grid = self.positions.flip(1).expand(len(image), 1, -1, 2)  # grid_sample takes (column, row)
        return F.grid_sample(image, grid, mode, padding_mode="border", align_corners=False).squeeze(2)

    def beside(self, clean):
        """-> the colours in float32 and their target, those of the clean image."""
        return self.colours.float(), self.colours_of(clean)


def filled(values, device):
    """-> a tensor of these numbers, filled on the device: for a copy of torch.tensor's the host would wait."""
    return torch.stack([torch.full((), value, device=device) for value in values])


class CoordinateINR(INR):
    """The representation that the paper describes (Sec. 3.2, Fig. 2), as in LIIF (arXiv 2012.09161): features
    B×dim×h×w -> image B×3×H×W of any size, or its colours at any points.

    Pixel i of n has its centre at c_i = -1 + (2i + 1)/n. A point p asks the four feature cells t around it, by their
    centres v_t, and blends their answers with the areas of the rectangles between p and the opposite cell's centre:

        answer_t = MLP(3×3 features at v_t, (p - v_t)·(h, w), γ(p) - γ(v_t), (2/H, 2/W)·(h, w))
        γ(p) = sin(2^l π p), cos(2^l π p) for l = 0 … 3 and both coordinates
    """

    octaves = 4

    def __init__(self, dim):
        super().__init__(dim, coordinates=2 + 2 * 2 * self.octaves)

    def encoded(self, positions):
        """γ: N×2 -> N×16."""
        angles = positions[..., None] * (torch.pi * 2.0 ** torch.arange(self.octaves, device=positions.device))
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)

    def query(self, x, positions, size):
        """B×dim×h×w, positions N×2, size (H, W) of the picture that the points belong to -> colours B×3×N."""
        first, rest = self.imnet.layers[0], self.imnet.layers[1:]
        features = self.first_layer(x).flatten(2)  # linear, so once is enough for all points
        by_coordinates = first.weight[:, 9 * x.shape[1] :]
        grid = filled(x.shape[2:], x.device)
        cell_size = 2 / filled(size, x.device) * grid
        positions_in_cells = (positions + 1) / 2 * grid - 0.5  # the centre of cell i lies at i
        colours = 0
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            cell = (positions_in_cells + filled(corner, x.device)).floor()
            area = (1 - (positions_in_cells - cell).abs()).prod(dim=1)
            cell = cell.clamp(torch.zeros_like(grid), grid - 1)
            centre = -1 + (2 * cell + 1) / grid
            encoded = self.encoded(positions) - self.encoded(centre)
            inputs = torch.cat([(positions - centre) * grid, encoded, cell_size.expand_as(centre)], dim=1)
            at_cell = features[:, :, (cell[:, 0] * grid[1] + cell[:, 1]).long()].transpose(1, 2)  # B×N×hidden
            colours = colours + rest(at_cell + F.linear(inputs, by_coordinates, first.bias)) * area[:, None]
        return colours.transpose(1, 2)

    def forward(self, x, size):
        rows, columns = (-1 + (2 * torch.arange(n, device=x.device) + 1) / n for n in size)
        return self.query(x, torch.cartesian_prod(rows, columns), size).unflatten(2, size)


class AblationNet(nn.Module):
    """MultiscaleNet with further options.

    Args:
        heads: None builds NeRD-Rain-MPRNet's blocks (paper Table 6), two channel-attention blocks each
        passes: over the images at 1/4, 1/2 and full size; the first may be 0
        inr: one of INRS; feedback: one of FEEDBACKS
        own_reduce: pass 3 of the full-size scale uses its own layer, not pass 2's
        antialias: the inputs at 1/2 and 1/4 size are means instead of single pixels
    """

    def __init__(self, dim, num_blocks, heads, passes, inr, feedback, own_reduce, antialias):
        super().__init__()
        if len(passes) != 3 or passes[0] < 0 or min(passes[1:]) < 1:
            raise ValueError(f"passes are three numbers, of which the first may be 0, not {passes}")
        size = {"dim": dim, "num_blocks": tuple(num_blocks), "heads": heads and tuple(heads)}
        wiring = {"passes": tuple(passes), "inr": inr, "feedback": feedback}
        self.options = {**size, **wiring, "own_reduce": own_reduce, "antialias": antialias}
        self.inr, self.antialias = inr, antialias
        slope = nn.PReLU() if heads is None else None  # a single one, shared by the whole network

        def block(level):
            channels = dim * 2**level
            if heads:
                return TransformerBlock(channels, heads[level])
            return named(decoder_level1=nn.Sequential(*(ChannelAttentionBlock(channels, slope) for _ in range(2))))

        def blocks(level):
            return nn.Sequential(*(block(level) for _ in range(num_blocks[level])))

        self.passes = {}  # by scale, its UShapes
        for scale, count in zip(SCALES, passes):
            if count:
                self.passes[scale] = add_scale(self, scale, count, dim, blocks)
                if scale in INRS[inr]:
                    if inr.startswith("coordinate"):
                        head = CoordinateINR(dim)
                    else:
                        head = INR(dim, 2 if inr == "no_encoding" else 18)
                    self.add_module(INR_NAMES[scale], head)
        self.fused = []  # BF1, BF2, …: (scale, number of the pass) that is fed back to
        for scale, finer in FINER.items():
            if scale in self.passes and FEEDBACKS[feedback]:
                count = min(len(self.passes[finer]) - 1, len(self.passes[scale]))
                self.fused += [(scale, number) for number in range(count)]
        for number in range(len(self.fused)):
            self.add_module(f"BF{number + 1}", FEEDBACKS[feedback](dim * 4))
        for scale in filter(self.passes.get, INRS[inr]):
            if inr == "own_embedding":
                self.add_module(f"{INR_NAMES[scale]}_embed", conv3x3(3, dim))
                continue
            self.add_module(f"{UPSAMPLER_NAMES[scale]}1", upsample(dim * 4))
            self.add_module(f"{UPSAMPLER_NAMES[scale]}2", upsample(dim * 2))
            if inr == "own_encoder":
                encoder = nn.Sequential(blocks(0), downsample(dim), blocks(1), downsample(dim * 2), blocks(2))
                self.add_module(f"{INR_NAMES[scale]}_encoder", encoder)
        if passes[2] >= 3 and not own_reduce:
            self.passes["max"][2].reduce_chan_level1 = self.reduce_chan_level1_max2
            self.reduce_chan_level1_max3.requires_grad_(False)

    def render(self, scale, image, latent):
        """-> what the head of a scale renders, which its loss sees, and what joins the next scale's image."""
        features = getattr(self, f"{UPSAMPLER_NAMES[scale]}2")(getattr(self, f"{UPSAMPLER_NAMES[scale]}1")(latent))
        head = getattr(self, INR_NAMES[scale])
        if not isinstance(head, CoordinateINR):
            rendered = head(features) + image
            return rendered, resize(rendered, 2)
        size = tuple(2 * side for side in image.shape[2:])
        rendered = head(features, size) + resize(image, 2)
        if self.inr == "coordinate_random" and self.training:
            drawn = torch.rand(size[0] * size[1], 2, pin_memory=image.is_cuda)  # by the CPU, whose state is saved
            points = Points(None, drawn.to(image, non_blocking=True) * 2 - 1)
            colours = head.query(features, points.positions, size) + points.colours_of(image, "nearest")
            return points._replace(colours=colours), rendered
        return rendered, rendered

    def forward(self, x):
        if x.shape[-2] % MULTIPLE or x.shape[-1] % MULTIPLE:
            raise ValueError(f"height and width must be multiples of {MULTIPLE}, not {x.shape[-2]} and {x.shape[-1]}")
        reduce = F.avg_pool2d if self.antialias else lambda x, factor: resize(x, 1 / factor)
        inputs = {scale: reduce(x, factor) if factor > 1 else x for scale, factor in SCALES.items()}

        images, rendered, latents, skips, handed_on = {}, {}, {}, {}, 0
        for scale, shapes in self.passes.items():  # coarse to fine
            images[scale], handed_on = inputs[scale] + handed_on, 0
            image = images[scale]
            if self.inr == "own_embedding":
                features = getattr(self, f"{INR_NAMES[scale]}_embed")(image)
                image = rendered[scale] = getattr(self, INR_NAMES[scale])(features) + image
            embedded = getattr(self, f"patch_embed_{scale}")(image)
            latent, skips[scale] = shapes[0].encode(embedded)
            latents[scale] = [latent]  # of each pass, as encoded
            if scale in INRS[self.inr] and self.inr != "own_embedding":
                encoder = getattr(self, f"{INR_NAMES[scale]}_encoder", None)
                latent = encoder(embedded) if encoder else latent
                rendered[scale], handed_on = self.render(scale, image, latent)

        features = {}  # of the scale's last pass so far
        for scale, shapes in reversed(self.passes.items()):  # fine to coarse
            skip = skips[scale]
            for number, shape in enumerate(shapes):
                latent = latents[scale][number]
                if (scale, number) in self.fused:
                    fusion = getattr(self, f"BF{self.fused.index((scale, number)) + 1}")
                    latent = latent + resize(fusion(*latents[FINER[scale]][number : number + 2]), 1 / 2)
                features[scale] = shape.decode(latent, skip)
                if number + 1 < len(shapes):
                    context = f"output_{scale}_context{number + 1 if len(shapes) > 2 else ''}"
                    latent, skip = shapes[number + 1].encode(getattr(self, context)(features[scale]))
                    latents[scale].append(latent)

        results, handed_on = {}, 0
        for scale in self.passes:  # coarse to fine
            decoded = features[scale] + handed_on
            results[scale], handed_on = getattr(self, f"output_{scale}")(decoded) + inputs[scale], resize(decoded, 2)
        renderings = [rendered.get("mid"), images["mid"] / 2, rendered.get("small"), images.get("small")]
        return [results["max"], results["mid"], results.get("small"), *renderings]


def build(dim=48, num_blocks=(2, 3, 3), heads=(1, 2, 4), **ablation):
    """The network with these options: MultiscaleNet, or AblationNet where it takes one."""
    options = DEFAULTS | ablation
    if heads is not None and options == DEFAULTS:
        return MultiscaleNet(dim, num_blocks, heads)
    return AblationNet(dim, num_blocks, heads, **options)


def network_name(net):
    """-> its published name, or its size, and what an ablation changes."""
    size = {name: net.options[name] for name in ("dim", "num_blocks", "heads")}
    name = "a network of width {dim}, blocks {num_blocks}".format(**size)
    for published, options in NETWORKS.items():
        if size == {"num_blocks": (2, 3, 3), "heads": (1, 2, 4), **options}:
            name = published
    changes = [f"{key} {net.options[key]}" for key, value in DEFAULTS.items() if net.options.get(key, value) != value]
    return ", ".join([name, *changes])


def checkpoint_activations(net):
    """Makes blocks compute their activations again in the backward pass: less memory, a third more time."""
    for module in net.modules():
        if isinstance(module, TransformerBlock | ChannelAttentionBlock):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    return net
