import numpy as np
import pytest
import torch

from losses import DerainLoss, EdgeDistance, Pyramid, charbonnier, fft_distance
from tests.golden import ARRAYS, NUMBERS, golden_input, golden_network
from train import make_schedule


def test_single_losses_are_the_published_ones():
    x, y = golden_input("loss_x", 2, 3, 61, 45), golden_input("loss_y", 2, 3, 61, 45)
    results = {"charbonnier": charbonnier(x, y), "edge": EdgeDistance()(x, y), "fft": fft_distance(x, y)}
    for name, result in results.items():
        assert result.item() == pytest.approx(NUMBERS["losses"][name], rel=1e-6), name


def test_pyramid_is_the_published_one_at_odd_sizes():
    levels = Pyramid()(golden_input("pyramid", 2, 3, 67, 93))
    for number, level in enumerate(levels):
        np.testing.assert_allclose(level, ARRAYS[f"pyramid/level{number}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, key, prefix, shape",
    [
        ("nerd_rain_s", "training", "", (2, 3, 64, 64)),
        ("nerd_rain_mprnet", "training_mprnet", "mprnet_", (1, 3, 32, 48)),
    ],
)
def test_training_terms_and_gradients_are_the_published_ones(name, key, prefix, shape):
    net, expected = golden_network(name), NUMBERS[key]
    x, y = golden_input(f"{prefix}train_input", *shape), golden_input(f"{prefix}train_target", *shape)
    losses = DerainLoss()(net(x), y)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected["terms"], rel=1e-6)
    losses["total"].backward()
    parameters = dict(net.named_parameters())
    assert parameters.keys() == expected["grad_norm"].keys()
    for parameter, norm in expected["grad_norm"].items():
        gradient = parameters[parameter].grad
        if norm is None:
            assert gradient is None, parameter
        else:
            assert gradient.norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-6), parameter


def test_eight_adam_steps_follow_the_published_ones():
    net = golden_network("nerd_rain_s").to(memory_format=torch.channels_last)
    loss, optimizer = DerainLoss(), torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x, y = golden_input("train_input", 2, 3, 64, 64), golden_input("train_target", 2, 3, 64, 64)
    trace = []
    for _ in range(8):
        optimizer.zero_grad()
        total = loss(net(x), y)["total"]
        total.backward()
        optimizer.step()
        trace.append(total.item())
    assert trace == pytest.approx(NUMBERS["training"]["adam_trace_lr1e-4"], rel=2e-6)


@pytest.mark.parametrize("epochs", [20, 300, 3000])
def test_learning_rates_are_the_published_ones(epochs):
    expected = NUMBERS["lr_schedule"][str(epochs)]
    if isinstance(expected, list):
        expected = dict(enumerate(expected, start=1))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule, rates = make_schedule(optimizer, epochs, 0), {}
    for epoch in range(1, epochs + 1):
        rates[epoch] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    for epoch, rate in expected.items():
        assert rates[int(epoch)] == pytest.approx(rate, rel=1e-12, abs=0), epoch


@pytest.mark.parametrize("done", [1, 3, 4, 5, 11])
def test_a_resumed_schedule_has_the_rates_of_an_uninterrupted_one(done):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    make_schedule(optimizer, 20, done)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(NUMBERS["lr_schedule"]["20"][done], rel=1e-12, abs=0)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_runs_no_longer_than_the_warm_up_have_a_schedule(epochs):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule, rates = make_schedule(optimizer, epochs, 0), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 1e-4 / 3, 2e-4 / 3, 1e-4][:epochs])


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


def test_perfect_outputs_leave_only_the_charbonnier_floor():
    y = torch.rand(1, 3, 64, 64)
    levels = Pyramid()(y)
    losses = DerainLoss()([*levels, levels[1], levels[1], levels[2], levels[2]], y)
    assert losses["fft"].item() == 0 and losses["l1"].item() == 0
    assert losses["charbonnier"].item() == pytest.approx(3e-3, rel=1e-4)
