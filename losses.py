"""The training losses of NeRD-Rain. They work in float32 whatever the network's precision, on any device."""

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = {"charbonnier": 1.0, "fft": 0.01, "edge": 0.05, "l1": 0.1}


def charbonnier(x, y, eps=1e-3):
    """Mean of √((x − y)² + ε²): a smooth L1 distance."""
    return torch.sqrt((x - y) ** 2 + eps**2).mean()


def fft_distance(x, y):
    """Mean modulus of the difference of two unnormalised spectra, B×C×H×W."""
    return torch.fft.fft2(x - y).abs().mean()  # the transform is linear: one is enough


def filter5x5(x, kernel, padding_mode):
    """Filters each channel of x (B×C×H×W) with a 5×5 kernel; the size stays."""
    channels = x.shape[1]
    x = F.pad(x, (2, 2, 2, 2), mode=padding_mode)
    return F.conv2d(x, kernel.expand(channels, 1, 5, 5), groups=channels)


class Pyramid(nn.Module):
    """B×C×H×W -> [full size, 1/2, 1/4]: each step blurs with the binomial kernel, then halves bilinearly to exactly
    (H // 2, W // 2). A side must be at least 6 pixels (reflection of the 1/2 level needs 3)."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("kernel", torch.outer(row, row), persistent=False)

    def forward(self, x):
        levels = [x]
        for _ in range(2):
            height, width = levels[-1].shape[-2:]
            blurred = filter5x5(levels[-1], self.kernel, "reflect")
            levels.append(F.interpolate(blurred, size=(height // 2, width // 2), mode="bilinear"))
        return levels


class EdgeDistance(nn.Module):
    """Charbonnier distance of Laplacians; the Laplacian is x minus its reduced and enlarged copy."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([0.05, 0.25, 0.4, 0.25, 0.05])
        self.register_buffer("kernel", torch.outer(row, row), persistent=False)

    def laplacian(self, x):
        reduced = filter5x5(x, self.kernel, "replicate")[:, :, ::2, ::2]
        enlarged = torch.zeros_like(x)
        enlarged[:, :, ::2, ::2] = 4 * reduced
        return x - filter5x5(enlarged, self.kernel, "replicate")

    def forward(self, x, y):
        return charbonnier(self.laplacian(x), self.laplacian(y))


class DerainLoss(nn.Module):
    """The published training objective.

    `loss(outputs, target)` takes the network's list of seven tensors, None where an ablation has none, and the clean
    image, B×3×H×W in [0, 1], and returns a dict of scalars: the unweighted sum over the scales of "charbonnier", "fft"
    and "edge", "l1" of the two INR renderings, and their weighted "total", which is to be minimised.
    """

    terms = (*WEIGHTS, "total")

    def __init__(self):
        super().__init__()
        self.pyramid = Pyramid()
        self.edge_distance = EdgeDistance()

    def forward(self, outputs, target):
        with torch.autocast(target.device.type, enabled=False):
            targets = self.pyramid(target.float())
            scales = [(output.float(), clean) for output, clean in zip(outputs, targets) if output is not None]
            renderings = [(outputs[3], targets[:2]), (outputs[5], targets[1:])]
            renderings = [self.beside_clean(*pair) for pair in renderings if pair[0] is not None]
            losses = {
                "charbonnier": sum(charbonnier(x, y) for x, y in scales),
                "fft": sum(fft_distance(x, y) for x, y in scales),
                "edge": sum(self.edge_distance(x, y) for x, y in scales),
                "l1": sum((F.l1_loss(x, clean) for x, clean in renderings), target.new_zeros(())),
            }
            return losses | {"total": sum(WEIGHTS[name] * loss for name, loss in losses.items())}

    @staticmethod
    def beside_clean(rendering, targets):
        """A rendering in float32 and its target, of the clean images at the next scale, which coordinate heads render,
        and at the head's own. A rendering that is no image brings its target."""
        if not torch.is_tensor(rendering):
            return rendering.beside(targets[0])
        return rendering.float(), next(clean for clean in targets if clean.shape == rendering.shape)
