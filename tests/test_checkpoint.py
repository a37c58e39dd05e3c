import zipfile

import pytest
import torch

import model
from model import MultiscaleNet
from tests.golden import NETWORKS, golden_weights
from utils import checkpoint
from utils.checkpoint import load_checkpoint, load_network, network_name, save_checkpoint
from utils.errors import UserError

NAMES = dict(zip(NETWORKS, ("NeRD-Rain", "NeRD-Rain-S", "NeRD-Rain-MPRNet")))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_recognised_from_a_released_checkpoint(tmp_path, name, prefix):
    weights = golden_weights(name)
    released = {"epoch": 5, "state_dict": {prefix + k: t for k, t in weights.items()}, "optimizer": {"state": {}}}
    torch.save(released, tmp_path / "released.pth")
    net = load_network(tmp_path / "released.pth")
    assert network_name(net) == NAMES[name]
    assert all(torch.equal(tensor, weights[key]) for key, tensor in net.state_dict().items())
    getattr(model, name)().load_state_dict(net.state_dict(), strict=True)


def test_other_sizes_bare_state_dicts_and_half_precision_are_recognised(tmp_path):
    net = MultiscaleNet(dim=8, num_blocks=(1, 2, 1), heads=(1, 2, 2))
    torch.save({key: tensor.half() for key, tensor in net.state_dict().items()}, tmp_path / "half.pth")
    loaded = load_network(tmp_path / "half.pth")
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x)[0], net(x)[0], rtol=0, atol=5e-3)


def test_averaged_weights_are_preferred(tmp_path):
    torch.manual_seed(0)
    raw, averaged = (MultiscaleNet(dim=8, num_blocks=(1, 1, 1)).state_dict() for _ in range(2))
    save_checkpoint(tmp_path / "both.pth", epoch=1, state_dict=raw, ema=averaged)
    net = load_network(tmp_path / "both.pth")
    assert torch.equal(net.output_max.weight, averaged["output_max.weight"])


def test_weights_are_passed_on_in_half_precision(tmp_path):
    raw, averaged = (MultiscaleNet(dim=8, num_blocks=(1, 1, 1)).state_dict() for _ in range(2))
    save_checkpoint(tmp_path / "both.pth", epoch=1, state_dict=raw, ema=averaged, optimizer={"state": {}})
    checkpoint.main([str(tmp_path / "both.pth"), str(tmp_path / "half.pth")])
    content = torch.load(tmp_path / "half.pth", weights_only=True)
    assert content.keys() == {"state_dict", "options"} and content["state_dict"].keys() == raw.keys()
    assert all(torch.equal(tensor, averaged[name].half()) for name, tensor in content["state_dict"].items())
    assert load_network(tmp_path / "half.pth").output_max.weight.dtype == torch.float32
    with pytest.raises(SystemExit, match=r"both.pth is there already"):
        checkpoint.main([str(tmp_path / "half.pth"), str(tmp_path / "both.pth")])


def test_a_recognised_mprnet_form_still_shares_its_slope(tmp_path):
    torch.save({"state_dict": golden_weights("nerd_rain_mprnet")}, tmp_path / "mprnet.pth")
    net = load_network(tmp_path / "mprnet.pth")
    assert len(list(net.parameters())) == 330


def narrow_state():
    return MultiscaleNet(dim=8, num_blocks=(1, 1, 1)).state_dict()


def changed(state, **tensors):
    return {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


@pytest.mark.parametrize(
    "content, expected",
    [
        (["a", "list"], "expected a dict .* found list"),
        ({"model": {"a": 1}}, "expected a dict .* found dict with .*model"),
        ({0: torch.zeros(1)}, "expected a dict"),
        ({"state_dict": {}}, "expected a dict"),
        ({"state_dict": narrow_state(), "ema": [1, 2]}, "expected a dict"),
        ({"state_dict": narrow_state(), "ema": torch.zeros(3)}, "expected a dict"),
        ({"state_dict": torch.zeros(3)}, "expected a dict"),
        (torch.zeros(3), "expected a dict .* found Tensor"),
        (changed(narrow_state(), output_max__weight=torch.zeros(3, 8, 3, 3, device="meta")), "expected a dict"),
        (changed(narrow_state(), output_max__weight=torch.zeros(3, 8, 3, 3).to_sparse()), "expected a dict"),
        ({"state_dict": {"conv.weight": torch.zeros(1)}}, "expected names such as .* found conv.weight"),
        (changed(narrow_state(), output_max__weight=torch.zeros(3, 9, 3, 3)), r"output_max.weight: expected \(3, 8, 3"),
        (changed(narrow_state(), output_max__weight=torch.full((3, 8, 3, 3), torch.nan)), "not finite numbers"),
        (changed(narrow_state(), extra=torch.zeros(2)), r"extra: expected nothing, found \(2,\)"),
        (changed(narrow_state(), patch_embed_small__proj__weight=torch.zeros(16, 3, 3, 3)), "does not fit .* found"),
    ],
)
def test_files_that_do_not_fit_say_what_was_expected_and_found(tmp_path, content, expected):
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=expected) as caught:
        load_network(tmp_path / "wrong.pth")
    assert "wrong.pth" in str(caught.value)


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match=r"hostile.pth cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "hostile.pth")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_truncated_checkpoints_are_named(tmp_path, kept):
    torch.save({"state_dict": narrow_state()}, tmp_path / "cut.pth")
    data = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"cut.pth cannot be read"):
        load_network(tmp_path / "cut.pth")


def test_compressed_checkpoints_are_refused_before_they_are_read(tmp_path, monkeypatch):
    torch.save({"state_dict": narrow_state()}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as stored,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    load_network(tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=r"b.pth cannot be read as a checkpoint \(it is compressed"):
        load_network(tmp_path / "b.pth")


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.pth does not exist"):
        load_network(tmp_path / "none.pth")


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path / "model.pth", epoch=1)
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path / "model.pth", epoch=2, unpicklable=lambda: None)
    assert load_epoch(tmp_path / "model.pth") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def load_epoch(path):
    return torch.load(path, weights_only=True)["epoch"]


@pytest.mark.parametrize("passes", [(3, 2, 1), (0, 2, 3)])
@pytest.mark.parametrize("inr, feedback", [("coordinate", "bfpu"), ("none", "sum"), ("own_embedding", "none")])
def test_ablations_are_recognised_from_their_files(tmp_path, passes, inr, feedback):
    net = MultiscaleNet(8, (1, 1, 1), passes=passes, inr=inr, feedback=feedback)
    save_checkpoint(tmp_path / "a.pth", state_dict=net.state_dict(), options=net.options)
    loaded = load_network(tmp_path / "a.pth")
    assert loaded.options == net.options and f"inr {inr}" in network_name(loaded)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(x)[0], net(x)[0])


@pytest.mark.parametrize("options", [{"dims": 8}, {"inr": "magic"}, {"passes": (1, 0, 3)}, ["dim"], {"dim": "8"}])
def test_options_that_no_network_has_are_refused(tmp_path, options):
    net = MultiscaleNet(8, (1, 1, 1))
    save_checkpoint(tmp_path / "a.pth", state_dict=net.state_dict(), options=options)
    with pytest.raises(UserError, match=r"a.pth .*(cannot be built|does not fit)"):
        load_network(tmp_path / "a.pth")
