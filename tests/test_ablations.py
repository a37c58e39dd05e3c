import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import ablations
from ablations import ABLATIONS, FEEDBACKS, INRS, NETWORKS, AblationNet, CoordinateINR, Points, build, network_name
from losses import DerainLoss
from model import INR, MultiscaleNet
from tests.conftest import NARROW
from tests.golden import golden_input, golden_weight


def test_without_options_the_ablation_net_is_the_published_network():
    torch.manual_seed(1)
    net = MultiscaleNet(**NARROW)
    torch.manual_seed(1)
    other, x = AblationNet(**NARROW, heads=(1, 2, 4), **ablations.DEFAULTS), golden_input("input", 1, 3, 32, 48)
    assert list(other.state_dict()) == list(net.state_dict())
    torch.testing.assert_close([other.state_dict(), other(x)], [net.state_dict(), net(x)], rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_named_with_their_options(name):
    with torch.device("meta"):
        assert network_name(build(**NETWORKS[name])) == name
        assert network_name(build(**NETWORKS[name], antialias=True)) == f"{name}, antialias True"


def check_forward_and_backward(options):
    net, x = build(**NARROW, **options), golden_input("input", 1, 3, 32, 32)
    outputs = net(x)
    losses = DerainLoss()(outputs, x)
    losses["total"].backward()
    inr, no_small = options.get("inr"), options.get("passes", (1, 2, 3))[0] == 0
    omitted = {2: no_small, 3: inr in ("none", "first"), 5: inr == "none" or no_small, 6: no_small}
    assert [output is None for output in outputs] == [omitted.get(number, False) for number in range(7)]
    assert outputs[0].shape == x.shape and losses["total"].isfinite()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)
    assert (losses["l1"] == 0) == (outputs[3] is None and outputs[5] is None)


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("heads", [(1, 2, 4), None])
def test_ablations_run_forward_and_backward(name, heads):
    check_forward_and_backward({**ABLATIONS[name], "heads": heads})


@pytest.mark.parametrize("passes", [(3, 2, 1), (2, 2, 2), (0, 2, 3)])
def test_ablations_combine(passes):
    for number, inr in enumerate(INRS):
        check_forward_and_backward({"passes": passes, "inr": inr, "feedback": list(FEEDBACKS)[number % 3]})


def test_every_ablation_changes_the_result():
    """With weights that depend on their names alone. Two are to be equal: without the local ensemble the published head
    is the same function, and random positions are for training."""
    x, results = golden_input("input", 1, 3, 32, 32), {}
    for name, options in ABLATIONS.items():
        net = build(**NARROW, **options).eval()
        net.load_state_dict({key: golden_weight(key, tensor.shape) for key, tensor in net.state_dict().items()})
        results[name] = net(x)[0]
    pairs = itertools.combinations(results, 2)
    equal = [pair for pair in pairs if torch.equal(*(results[name] for name in pair))]
    assert equal == [("published", "inr_no_ensemble"), ("inr_coordinate", "inr_coordinate_random")]


def test_antialias_averages_the_inputs():
    x = golden_input("input", 1, 3, 32, 32)
    default, antialias = build(**NARROW)(x)[6], build(**NARROW, antialias=True)(x)[6]
    means = x.unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean(dim=(3, 5))
    torch.testing.assert_close(antialias, means, rtol=0, atol=1e-6)
    assert torch.equal(default, x[..., ::4, ::4])


@pytest.mark.parametrize("heads", [(1, 2, 4), None])
def test_checkpointed_activations_change_memory_and_nothing_else(heads):
    x, clean = golden_input("input", 1, 3, 32, 32), golden_input("target", 1, 3, 32, 32)
    gradients, saved = [], []
    for prepare in (lambda net: net, ablations.checkpoint_activations):
        torch.manual_seed(0)
        net, sizes = prepare(build(**NARROW, heads=heads)), {}

        def remember(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            total = DerainLoss()(net(x), clean)["total"]
        total.backward()
        gradients.append([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
        weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
        saved.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert saved[1] < 0.7 * saved[0]


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
            encodings = [p - c for p, c in zip(encoded(point), encoded(centre))]
            inputs = [*padded[b, :, y : y + 3, x : x + 3].flatten(), *relative, *encodings]
            inputs += [2 / size[0] * height, 2 / size[1] * width]
            result[b, :, i, j] += area * head.imnet.layers(torch.tensor(inputs))
    return result


@torch.inference_mode()
def test_coordinate_heads_render_what_their_equations_say():
    head, features = CoordinateINR(2), torch.randn(2, 2, 3, 4)
    for size in ((3, 4), (6, 8), (5, 7), (2, 9)):
        torch.testing.assert_close(head(features, size), render_slowly(head, features, size), rtol=0, atol=1e-5)
    torch.testing.assert_close(head(features, (3, 4)), INR.forward(head, features), rtol=0, atol=1e-6)


def test_random_positions_are_supervised_by_the_picture_between_its_pixels():
    rows, columns = torch.meshgrid(*[-1 + (2 * torch.arange(16) + 1) / 16] * 2, indexing="ij")
    ramp = torch.stack([rows, columns, rows + 2 * columns])[None].expand(2, -1, -1, -1)
    positions = torch.rand(50, 2) * 1.8 - 0.9
    expected = torch.stack([positions[:, 0], positions[:, 1], positions @ torch.tensor([1.0, 2.0])])
    torch.testing.assert_close(Points(None, positions).colours_of(ramp), expected.expand(2, -1, -1), rtol=0, atol=1e-6)

    net, x = build(**NARROW, inr="coordinate_random"), golden_input("input", 2, 3, 32, 32)
    outputs = net(x)
    assert [outputs[number].colours.shape for number in (3, 5)] == [(2, 3, 32 * 32), (2, 3, 16 * 16)]
    perfect = list(outputs)
    for number, clean in ((3, x), (5, DerainLoss().pyramid(x)[1])):
        perfect[number] = outputs[number]._replace(colours=outputs[number].colours_of(clean))
    assert DerainLoss()(perfect, x)["l1"] == 0 < DerainLoss()(outputs, x)["l1"]
    assert [output.shape for output in net.eval()(x)[3::2]] == [(2, 3, 32, 32), (2, 3, 16, 16)]
