import shutil

import pytest
import torch

from tests.golden import NUMBERS
from tests.test_train_script import ROOT
from utils import checkpoint, weights
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.errors import UserError


@pytest.fixture
def mirror(tmp_path, monkeypatch, narrow_weights):
    """A mirror with one file of weights, of a narrow network that counts as NeRD-Rain-S, and an empty folder for it."""
    monkeypatch.setitem(checkpoint.PUBLISHED, (8, (1, 1, 1), (1, 2, 4)), "NeRD-Rain-S")
    monkeypatch.setattr(weights, "RELEASED", tmp_path / "released")
    (tmp_path / "mirror" / "NeRD-Rain-S").mkdir(parents=True)
    shutil.copy(narrow_weights, tmp_path / "mirror" / "NeRD-Rain-S" / "Rain200L.pth")
    return str(tmp_path / "mirror")


def test_the_list_names_all_weights_and_what_is_here(capsys, mirror):
    weights.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 11 + 2
    own = next(line for line in lines if line.startswith("own"))
    assert "10.53 M" in own and own.endswith("checkpoints/nerd_rain_s.pth") and "not here" not in own
    line = next(line for line in lines if line.startswith("NeRD-Rain/Rain200L"))
    assert "22.89 M  41.71 0.9903" in line and "not here: https://drive.google.com/" in line


def test_weights_are_fetched_by_name(capsys, mirror, tmp_path):
    with pytest.raises(SystemExit, match="no weights NeRD-Rain-S/DDN were released"):
        weights.main(["NeRD-Rain-S/Rain200L", "NeRD-Rain-S/DDN", "--mirror", mirror])
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("NeRD-Rain-S/Rain200L"))
    assert "not here" not in line and "MiB" in line
    assert (tmp_path / "released" / "NeRD-Rain-S" / "Rain200L.pth").exists()


def test_hub_builds_the_networks_with_and_without_weights(mirror):
    def load(name, **options):
        return torch.hub.load(str(ROOT), name, source="local", **options)

    for name in ("nerd_rain", "nerd_rain_s", "nerd_rain_mprnet"):
        parameters = sum(p.numel() for p in load(name).parameters())
        assert parameters == NUMBERS[name]["parameters"]
    net, own = load("nerd_rain_s", pretrained=True), load_network(OWN_WEIGHTS)
    assert not net.training and all(torch.equal(a, b) for a, b in zip(net.parameters(), own.parameters(), strict=True))
    with pytest.raises(UserError, match=r"no weights of NeRD-Rain of its own; .* pretrained='Rain200L', 'Rain200H'"):
        load("nerd_rain", pretrained=True)
    with pytest.raises(UserError, match="NeRD-Rain-MPRNet of its own; the authors' are pretrained='unstated'"):
        load("nerd_rain_mprnet", pretrained=True)
    with pytest.raises(UserError, match="no weights NeRD-Rain-S/1 were released"):
        load("nerd_rain_s", pretrained=1)
    weights.load_released("NeRD-Rain-S", "Rain200L", mirror=mirror)
    assert load("nerd_rain_s", pretrained="Rain200L").options["dim"] == 8
    with pytest.raises(UserError, match="leave dim away"):
        load("nerd_rain_s", pretrained=True, dim=8)
