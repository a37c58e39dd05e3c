import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ablations import ChannelAttentionBlock, build
from benchmarks.published import published
from model import INR, Attention, FeedForward, LayerNorm, PixelShuffle, PixelUnshuffle, TransformerBlock
from tests import golden
from tests.conftest import NARROW
from tests.golden import ARRAYS, NETWORKS, NUMBERS, golden_input, golden_network
from utils.devices import strict_float32

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("name", NETWORKS)
def test_names_order_shapes_and_initial_weights_are_the_published_ones(name):
    torch.manual_seed(1234)
    net, expected = golden.build(name), NUMBERS[name]
    weights = net.state_dict()
    assert [(key, list(tensor.shape)) for key, tensor in weights.items()] == list(expected["state_dict"].items())
    assert sum(parameter.numel() for parameter in net.parameters()) == expected["parameters"]
    for key, sums in NUMBERS["initial_weights_seed_1234"][name].items():
        weight = weights[key].double()
        assert [weight.abs().sum().item(), weight.sum().item()] == pytest.approx(sums, rel=1e-12, abs=1e-9), key


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_outputs_are_the_published_ones(name):
    """In both memory formats, and so are those of the published formulation, which computes on contiguous tensors."""
    net, contiguous = golden_network(name), []
    plain = published(net)
    for module in plain.modules():
        module.register_forward_pre_hook(lambda module, x: contiguous.append(all(y.is_contiguous() for y in x)))
    shapes = {key.split("/")[1] for key in ARRAYS if key.startswith(f"{name}/") and key.endswith("output0")}
    for shape in shapes:
        expected = [ARRAYS[f"{name}/{shape}/output{number}"] for number in range(7)]
        x = golden_input(f"input{shape}", *expected[0].shape)
        results = [plain(x), *(net.to(memory_format=layout)(x.to(memory_format=layout)) for layout in FORMATS)]
        for result in results:
            for output, array in zip(result, expected, strict=True):
                np.testing.assert_allclose(output, array, rtol=0, atol=5e-6)
    assert len(contiguous) > 100 and all(contiguous)


@torch.inference_mode()
def test_parts_give_the_published_outputs():
    net = golden_network("nerd_rain_s")
    results = {
        "INR": net.INR(golden_input("inr_features", 2, 32, 12, 20) - 0.5),
        "BF1": net.BF1(golden_input("fusion_a", 1, 128, 6, 10) - 0.5, golden_input("fusion_b", 1, 128, 6, 10) - 0.5),
        "encoder_level2_small.0": net.encoder_level2_small[0](golden_input("block", 1, 64, 10, 14) - 0.5),
    }
    for name, result in results.items():
        np.testing.assert_allclose(result, ARRAYS[f"nerd_rain_s/{name}/output"], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("part_of", [INR, FeedForward, LayerNorm, partial(Attention, heads=3)])
def test_parts_equal_the_published_formulation(part_of):
    """Outputs and gradients, in float64: in float32 rounding moves a value across a ReLU's zero now and then.

    Channels that are all zero, of black pictures, have finite gradients, too.
    """
    part = part_of(12).double()
    plain = published(part)
    assert type(plain) is not type(part)
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64, requires_grad=True)
    gradients = []
    for module in (part, plain):
        y = module(x)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*gradients)
    black = torch.zeros_like(x).requires_grad_()
    assert all(g.isfinite().all() for g in torch.autograd.grad(part(black).sum(), [black, *part.parameters()]))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_shuffles_equal_those_of_pytorch_bit_by_bit_and_are_channels_last(memory_format):
    for ours, theirs in ((PixelShuffle(), F.pixel_shuffle), (PixelUnshuffle(), F.pixel_unshuffle)):
        x = torch.randn(2, 8, 6, 10).to(memory_format=memory_format)
        y = ours(x)
        assert torch.equal(y, theirs(x, 2)) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("heads", [(1, 2, 4), None])
def test_tensors_stay_channels_last_where_pytorch_shuffles_to_contiguous_ones(heads, monkeypatch):
    """As on CUDA: blocks and convolutions would copy them."""
    for library in (F, torch):
        for name in ("pixel_shuffle", "pixel_unshuffle"):
            shuffle = getattr(library, name)
            monkeypatch.setattr(library, name, lambda x, factor, shuffle=shuffle: shuffle(x, factor).contiguous())
    net, inputs = build(**NARROW, heads=heads).to(memory_format=torch.channels_last), []
    for module in net.modules():
        if isinstance(module, TransformerBlock | ChannelAttentionBlock | torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda module, x: inputs.extend(x))
    net(torch.rand(1, 3, 64, 64).to(memory_format=torch.channels_last))
    assert len(inputs) > 100 and all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


def assigned(net):
    with torch.device("meta"):
        other = build(**net.options)
    other.load_state_dict(net.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("copy_of", [copy.deepcopy, assigned, published])
@pytest.mark.parametrize("options", [{}, {"heads": None}, {"passes": (3, 2, 1)}])
@torch.no_grad()
def test_a_copy_computes_with_its_own_parts(copy_of, options):
    """A network's UShapes are views of its parts, which copying and loading must not tear off."""
    net, other, x = build(**NARROW, **options), build(**NARROW, **options), torch.rand(1, 3, 32, 32)
    before, expected = net(x)[0], other(x)[0]
    twin = copy_of(net)
    torch.testing.assert_close(twin(x)[0], before, rtol=0, atol=1e-5)
    twin.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
    torch.testing.assert_close(twin(x)[0], expected, rtol=0, atol=1e-5)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(twin(x)[0], x) and torch.equal(net(x)[0], before)


@pytest.mark.parametrize("ablation", [{}, {"antialias": True}])
@pytest.mark.parametrize("size", [(40, 32), (32, 17)])
def test_sizes_that_are_no_multiples_of_16_are_refused(ablation, size):
    with pytest.raises(ValueError, match=f"multiples of 16, not {size[0]} and {size[1]}"):
        build(**NARROW, **ablation)(torch.rand(1, 3, *size))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_a_gpu_gives_the_published_outputs(name):
    expected = next(array for key, array in ARRAYS.items() if key.startswith(f"{name}/1x") and key.endswith("/output0"))
    size = "x".join(map(str, (1, *expected.shape[2:])))
    net, x = golden_network(name).cuda(), golden_input(f"input{size}", *expected.shape).cuda()
    for layout in FORMATS:
        with strict_float32():
            output = net.to(memory_format=layout)(x.to(memory_format=layout))[0].cpu()
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
