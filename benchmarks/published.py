"""The network as the published code computes it, written plainly: ours must agree with it, and benchmarks compare with
it. Weights and wiring are those of model.py; only how the parts compute is replaced, on contiguous NCHW tensors."""

import copy

import torch
import torch.nn.functional as F

import model


class PixelUnshuffle(model.PixelUnshuffle):
    def forward(self, x):
        return F.pixel_unshuffle(x, 2)


class PixelShuffle(model.PixelShuffle):
    def forward(self, x):
        return F.pixel_shuffle(x, 2)


class LayerNorm(model.LayerNorm):
    """Written out, over a copy that has a row for each pixel."""

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2).contiguous()  # B×HW×C
        mean = rows.mean(dim=2, keepdim=True)
        variance = rows.var(dim=2, keepdim=True, unbiased=False)
        rows = (rows - mean) / torch.sqrt(variance + 1e-5) * self.body.weight + self.body.bias
        return rows.transpose(1, 2).reshape(x.shape).contiguous()


class Attention(model.Attention):
    """Normalizes q and k, multiplies, and projects the result with a convolution."""

    def forward(self, x):
        heads = len(self.temperature)
        q, k, v = (t.flatten(2).unflatten(1, (heads, -1)) for t in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1))
        scores = F.normalize(q, dim=3) @ F.normalize(k, dim=3).transpose(2, 3) * self.temperature
        return self.project_out((scores.softmax(dim=3) @ v).reshape(x.shape))


class FeedForward(model.FeedForward):
    """Computes gate and value together and splits them."""

    def forward(self, x):
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class INR(model.INR):
    """Unfolds neighbourhoods, appends relative coordinates and cells, runs the MLP four times and averages."""

    def forward(self, x):
        neighbourhoods = F.unfold(x, 3, padding=1).transpose(1, 2)  # B×hw×9C
        pixels, coordinates = neighbourhoods.shape[:2], self.imnet.layers[0].in_features - 9 * x.shape[1] - self.cells
        relative = [x.new_zeros(*pixels, coordinates), x.new_full((*pixels, self.cells), 2.0)]
        answers = [self.imnet(torch.cat([neighbourhoods, *relative], dim=2)) for _ in range(4)]
        return (sum(answers) / 4).transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


def published(net):
    """-> a copy of a network (MultiscaleNet or AblationNet) or of a part that computes as the published code does."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    plain = {cls.__base__: cls for cls in (PixelUnshuffle, PixelShuffle, LayerNorm, Attention, FeedForward, INR)}
    for module in net.modules():  # changed in place, so that the network's UShapes keep their parts
        module.__class__ = plain.get(type(module), type(module))
    return net
