import numpy as np
import pytest
import torch

from losses import DerainLoss, EdgeDistance, Pyramid, charbonnier, fft_distance
from tests.golden import ARRAYS, NUMBERS, golden_input, golden_network


def test_single_losses_are_the_published_ones():
    x, y = golden_input("loss_x", 2, 3, 61, 45), golden_input("loss_y", 2, 3, 61, 45)
    results = {"charbonnier": charbonnier(x, y), "edge": EdgeDistance()(x, y), "fft": fft_distance(x, y)}
    for name, result in results.items():
        assert result.item() == pytest.approx(NUMBERS["losses"][name], rel=1e-6), name


def test_pyramid_is_the_published_one_at_odd_sizes():
    levels = Pyramid()(golden_input("pyramid", 2, 3, 67, 93))
    for number, level in enumerate(levels):
        np.testing.assert_allclose(level, ARRAYS[f"pyramid/level{number}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "name, shape, infix", [("nerd_rain_s", (2, 3, 64, 64), ""), ("nerd_rain_mprnet", (1, 3, 32, 48), "mprnet_")]
)
def test_training_terms_and_gradients_are_the_published_ones(name, shape, infix, memory_format):
    net, expected = golden_network(name).to(memory_format=memory_format), NUMBERS[f"training_{infix}".rstrip("_")]
    x, y = golden_input(f"{infix}train_input", *shape), golden_input(f"{infix}train_target", *shape)
    losses = DerainLoss()(net(x.to(memory_format=memory_format)), y)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected["terms"], rel=1e-6)
    losses["total"].backward()
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters() if p.grad is not None}
    reached = {name: norm for name, norm in expected["grad_norm"].items() if norm is not None}
    assert norms == pytest.approx(reached, rel=5e-4, abs=1e-6)


def test_the_first_adam_steps_follow_the_published_ones():
    """The losses before each of them. The bound holds on any processor whose gradients have a relative error of at most
    r = 5e-4, as the test above asserts.

    Adam moves each weight by about lr, even one whose gradient is mere rounding, and then in any direction. But the
    loss hardly depends on such a weight: where a gradient errs by e, a step changes the loss by at most 2·lr·e too
    much. Over all weights that is 2·r·lr·Σ|gradient|, which is 2r of what the step lowers the loss by.
    """
    net = golden_network("nerd_rain_s").to(memory_format=torch.channels_last)
    loss, optimizer = DerainLoss(), torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x, y = golden_input("train_input", 2, 3, 64, 64), golden_input("train_target", 2, 3, 64, 64)
    expected = NUMBERS["training"]["adam_trace_lr1e-4"][:4]  # the other steps take time and show nothing new
    for before in expected:
        optimizer.zero_grad()
        total = loss(net(x), y)["total"]
        assert total.item() == pytest.approx(before, rel=1e-6, abs=1e-3 * (expected[0] - before))
        total.backward()
        optimizer.step()


def test_losses_work_in_float32_under_autocast_and_on_bfloat16():
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    half, quarter = x[..., ::2, ::2], x[..., ::4, ::4]
    outputs = [output.bfloat16() for output in (x, half, quarter, half, half, quarter, quarter)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = DerainLoss()(outputs, y)
    expected = DerainLoss()([output.float() for output in outputs], y)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == expected[name].item(), name
