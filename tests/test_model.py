import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from benchmarks.training import kept_activations
from losses import DerainLoss, EdgeDistance, Pyramid
from model import INR, Attention, CoordinateINR, MultiscaleNet
from tests.golden import ARRAYS, NETWORKS, NUMBERS, golden_input, golden_network
from tests.yardstick import yardstick
from utils.devices import strict_float32


@pytest.mark.parametrize("name", NETWORKS)
def test_names_shapes_order_and_parameters_are_the_published_ones(name):
    net = getattr(model, name)()
    expected = NUMBERS[name]
    shapes = {key: list(tensor.shape) for key, tensor in net.state_dict().items()}
    assert list(shapes.items()) == list(expected["state_dict"].items())
    assert sum(parameter.numel() for parameter in net.parameters()) == expected["parameters"]


@pytest.mark.parametrize("name", NETWORKS)
def test_seed_1234_gives_the_published_initial_weights(name):
    torch.manual_seed(1234)
    net = getattr(model, name)()
    sums = {k: (t.double().abs().sum().item(), t.double().sum().item()) for k, t in net.state_dict().items()}
    for key, expected in NUMBERS["initial_weights_seed_1234"][name].items():
        assert sums[key] == pytest.approx(tuple(expected), rel=1e-12, abs=1e-9), key


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_published_ones(name, memory_format):
    net = golden_network(name).to(memory_format=memory_format)
    shapes = {key.split("/")[1] for key in ARRAYS if key.startswith(f"{name}/") and key.endswith("output0")}
    assert shapes
    for shape in shapes:
        batch, *size = map(int, shape.split("x"))
        with torch.inference_mode():
            outputs = net(golden_input(f"input{shape}", batch, 3, *size).to(memory_format=memory_format))
        assert len(outputs) == 7
        for number, output in enumerate(outputs):
            np.testing.assert_allclose(output, ARRAYS[f"{name}/{shape}/output{number}"], rtol=0, atol=5e-6)


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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_formulation_gives_the_same_outputs(name, memory_format):
    torch.manual_seed(0)
    net = golden_network(name)
    x = torch.rand(2, 3, 48, 64)
    with torch.inference_mode():
        expected = yardstick(net)(x)
        outputs = net.to(memory_format=memory_format)(x.to(memory_format=memory_format))
    for output, other in zip(outputs, expected):
        torch.testing.assert_close(output, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part, inputs", [(lambda: INR(8), (2, 8, 10, 14)), (lambda: Attention(12, 3), (2, 12, 7, 9))])
def test_parts_equal_the_published_formulation(part, inputs):
    """Outputs and gradients, in float64: in float32 rounding moves a value across a ReLU's zero now and then.

    Channels that are all zero, on black pictures, have finite gradients, too.
    """
    part = part().double()
    plain = yardstick(part)
    assert type(plain) is not type(part)
    x = torch.randn(inputs).double()
    gradients = []
    for module in (part, plain):
        y = module(x)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)
    black = part(torch.zeros(inputs).double()).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(black, list(part.parameters())))


def test_attention_in_half_precision_stays_near():
    attention, x = Attention(16, 2), torch.rand(1, 16, 24, 24)
    expected = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention(x).float(), expected, rtol=0.05, atol=0.02)
    torch.testing.assert_close(attention.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.02)


def test_pass_3_of_the_max_scale_reduces_with_the_layer_of_pass_2():
    net, x = MultiscaleNet(dim=8, num_blocks=(1, 1, 1)), torch.rand(1, 3, 32, 32)
    DerainLoss()(net(x), x)["total"].backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == ["reduce_chan_level1_max3.weight"]
    with torch.no_grad():
        before = net(x)[0]
        net.reduce_chan_level1_max3.weight.add_(1)
        assert torch.equal(net(x)[0], before)
        net.reduce_chan_level1_max2.weight.add_(1)
        assert not torch.allclose(net(x)[0], before)


def test_mprnet_form_has_one_slope_for_all_blocks():
    net = model.nerd_rain_mprnet()
    slopes = {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.PReLU)}
    assert len(slopes) == 1 and len(list(net.parameters())) == 330


@pytest.mark.parametrize("heads", [(1, 2, 4), None])
def test_nothing_names_a_device(heads):
    """The meta device has no data: any tensor made elsewhere in a forward pass would clash with it."""
    net = MultiscaleNet(dim=8, num_blocks=(1, 1, 1), heads=heads).to("meta")
    x = torch.empty(1, 3, 32, 48, device="meta")
    assert {output.device.type for output in net(x)} == {"meta"}
    assert EdgeDistance().to("meta")(x, x).device.type == "meta"
    assert Pyramid().to("meta")(x)[2].device.type == "meta"


@pytest.mark.parametrize("size", [(40, 32), (32, 17)])
def test_sizes_that_are_no_multiples_of_16_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 16, not"):
        MultiscaleNet(dim=8)(torch.rand(1, 3, *size))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_cpu_outputs():
    net, x = golden_network("nerd_rain_s"), golden_input("input1x64x64", 1, 3, 64, 64)
    with torch.inference_mode(), strict_float32():
        output = net.cuda()(x.cuda())[0].cpu()
    np.testing.assert_allclose(output, ARRAYS["nerd_rain_s/1x64x64/output0"], rtol=0, atol=1e-4)


def test_checkpointed_activations_change_memory_and_nothing_else():
    x, clean = golden_input("input", 1, 3, 32, 32), golden_input("target", 1, 3, 32, 32)
    gradients, kept = [], []
    for prepare in (lambda net: net, model.checkpoint_activations):
        torch.manual_seed(0)
        net = prepare(MultiscaleNet(dim=8, num_blocks=(1, 1, 1)))
        kept.append(kept_activations(lambda net=net: DerainLoss()(net(x), clean)["total"]))
        DerainLoss()(net(x), clean)["total"].backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("passes", [(1, 2, 3), (3, 2, 1), (2, 2, 2), (0, 2, 3)])
@pytest.mark.parametrize(
    "inr, feedback", [*((inr, "bfpu") for inr in model.INRS), ("published", "sum"), ("coordinate", "none")]
)
def test_ablations_run_forward_and_backward(passes, inr, feedback):
    net = MultiscaleNet(8, (1, 1, 1), passes=passes, inr=inr, feedback=feedback)
    x = golden_input("input", 1, 3, 32, 32)
    outputs = net(x)
    losses = DerainLoss()(outputs, x)
    losses["total"].backward()
    assert outputs[0].shape == x.shape and losses["total"].isfinite()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert (outputs[2] is None) == (passes[0] == 0) and (outputs[3] is None) == (inr in ("none", "first"))
    assert (losses["l1"] == 0) == (outputs[3] is None and outputs[5] is None)


def test_what_an_ablation_leaves_away_matters():
    """Each option changes the result of otherwise equal weights, but for the local ensemble of the published head."""
    x, results = golden_input("input", 1, 3, 32, 32), {}
    weights = MultiscaleNet(8, (1, 1, 1)).state_dict()
    kinds = [(inr, f) for inr in ("published", "none", "first", "coordinate", "no_ensemble") for f in ("bfpu", "none")]
    for inr, feedback in kinds:
        net = MultiscaleNet(8, (1, 1, 1), inr=inr, feedback=feedback)
        net.load_state_dict(weights, strict=False)
        results[inr, feedback] = net(x)[0]
    for first, second in itertools.combinations(kinds, 2):
        alike = first[1] == second[1] and {first[0], second[0]} == {"published", "no_ensemble"}
        assert torch.equal(results[first], results[second]) == alike, (first, second)


@pytest.mark.parametrize("options", [{"inr": "magic"}, {"feedback": "x"}, {"passes": (1, 0, 3)}, {"passes": (1, 2)}])
def test_options_must_exist(options):
    with pytest.raises(ValueError, match="passes are three numbers"):
        MultiscaleNet(8, **options)


def render_slowly(head, features, size):
    """CoordinateINR's equations, pixel by pixel."""
    (height, width), padded = features.shape[2:], F.pad(features, (1, 1, 1, 1))
    octaves = [2**octave * math.pi for octave in range(4)]

    def encoded(point):
        return [function(frequency * c) for c in point for function in (math.sin, math.cos) for frequency in octaves]

    result = torch.zeros(len(features), 3, *size)
    for b, i, j in itertools.product(range(len(features)), *map(range, size)):
        point = [-1 + (2 * i + 1) / size[0], -1 + (2 * j + 1) / size[1]]
        for row, column in itertools.product((-1, 1), repeat=2):
            y, x = ((c + 1) / 2 * n + d * 0.5 for c, n, d in zip(point, (height, width), (row, column)))
            y, x = math.floor(y + 1e-9), math.floor(x + 1e-9)
            area = math.prod(1 - abs((c + 1) / 2 * n - 0.5 - t) for c, n, t in zip(point, (height, width), (y, x)))
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            centre = [-1 + (2 * y + 1) / height, -1 + (2 * x + 1) / width]
            relative = [(p - c) * n for p, c, n in zip(point, centre, (height, width))]
            between = [p - c for p, c in zip(encoded(point), encoded(centre))]
            inputs = [*padded[b, :, y : y + 3, x : x + 3].flatten(), *relative, *between]
            inputs += [2 / size[0] * height, 2 / size[1] * width]
            result[b, :, i, j] += area * head.imnet.layers(torch.tensor(inputs))
    return result


@torch.inference_mode()
def test_coordinate_heads_render_what_their_equations_say():
    torch.manual_seed(0)
    head, features = CoordinateINR(2), torch.randn(2, 2, 3, 4)
    for size in ((3, 4), (6, 8), (5, 7), (2, 9)):
        torch.testing.assert_close(head(features, size), render_slowly(head, features, size), rtol=0, atol=1e-5)
    torch.testing.assert_close(head(features, (3, 4)), INR.forward(head, features), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_coordinate_heads_turn_with_what_they_render():
    """A head whose weights are as symmetric as the square gives the turned picture of turned features."""
    torch.manual_seed(0)
    head, features = CoordinateINR(4, encoding=False), torch.randn(1, 4, 6, 6)
    first = head.imnet.layers[0].weight
    kernel = first[:, :36].unflatten(1, (4, 3, 3))
    first[:, :36] = (sum(torch.rot90(kernel, turns, (2, 3)) for turns in range(4)) / 4).flatten(1)
    first[:, 36:38] = 0  # the relative coordinates
    turned = head(torch.rot90(features, 1, (2, 3)), (17, 17))
    torch.testing.assert_close(torch.rot90(turned, -1, (2, 3)), head(features, (17, 17)), rtol=0, atol=1e-5)
