import pytest
import torch

from evaluations.metrics import psnr_ssim
from tests.conftest import ROOT, save_narrow
from tests.golden import NUMBERS
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import Derainer
from utils.files import UserError
from utils.pictures import read_image


def load(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


def test_networks_without_weights():
    for name in ("nerd_rain", "nerd_rain_s", "nerd_rain_mprnet"):
        assert sum(parameter.numel() for parameter in load(name).parameters()) == NUMBERS[name]["parameters"]


def test_own_weights():
    net, own = load("nerd_rain_s", pretrained=True), load_network(OWN_WEIGHTS)
    assert not net.training and all(torch.equal(a, b) for a, b in zip(net.parameters(), own.parameters(), strict=True))
    demo = ROOT / "Datasets" / "demo" / "test"
    rainy, clean = (read_image(demo / name)[:128, :128] for name in ("input/chelsea_2.png", "target/chelsea.png"))
    derained = Derainer(net, "window", 128)(rainy)
    assert psnr_ssim(derained, clean, "rain200")[0] > psnr_ssim(rainy, clean, "rain200")[0] + 5
    with pytest.raises(UserError, match=r"no weights of NeRD-Rain; .* pretrained='Rain200L', 'Rain200H'"):
        load("nerd_rain", pretrained=True)


def test_released_weights(narrow_is_published, tmp_path):
    save_narrow(tmp_path / "released" / "NeRD-Rain-S" / "Rain200L.pth")
    assert load("nerd_rain_s", pretrained="Rain200L").options["dim"] == 8


def test_pictures_are_derained(narrow_weights):
    picture = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8).numpy()
    derain = load("derain", image=picture, weights=narrow_weights, gpus="cpu")
    assert derain.shape == picture.shape and (derain != picture).any()
