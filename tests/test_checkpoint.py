import errno
import os
import zipfile

import numpy as np
import pytest
import torch

from ablations import ABLATIONS, DEFAULTS, build, network_name
from tests import golden
from tests.golden import golden_weights
from utils import checkpoint
from utils.checkpoint import OWN_WEIGHTS, build_network, load_checkpoint, load_network, load_newest, save_checkpoint
from utils.files import UserError

NARROW = {"dim": 8, "num_blocks": (1, 1, 1)}


def narrow_weights_with(**tensors):
    """Weights of a narrow network, of which some are replaced; __ stands for a dot."""
    weights = build(**NARROW).state_dict()
    return weights | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def check_computes_like(net, other):
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert net.options == other.options and torch.equal(net.eval()(x)[0], other.eval()(x)[0])


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_the_network_is_recognised_from_a_released_checkpoint(tmp_path, name):
    weights = golden_weights(name)
    torch.save({"epoch": 5, "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "released.pth")
    net = load_network(tmp_path / "released.pth")
    assert network_name(net) == golden.NETWORKS[name]
    assert all(torch.equal(tensor, weights[key]) for key, tensor in net.state_dict().items())
    assert len(list(net.parameters())) == len(list(golden.build(name).parameters()))  # one slope is shared
    assert not all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_parallel_and_compiled_networks_are_stripped(tmp_path, prefix):
    raw, averaged = build(**NARROW), build(**NARROW)
    parts = {"state_dict": raw, "ema": averaged}
    parts = {part: {prefix + name: t for name, t in net.state_dict().items()} for part, net in parts.items()}
    torch.save(parts, tmp_path / "a.pth")
    content = load_checkpoint(tmp_path / "a.pth")
    check_computes_like(build_network(content, "a.pth"), averaged)
    check_computes_like(build_network({"state_dict": content["state_dict"]}, "a.pth"), raw)


def test_bare_half_precision_weights_of_another_size_are_recognised(tmp_path):
    net = build(dim=8, num_blocks=(1, 2, 1), heads=(1, 2, 2)).half().float()
    torch.save({key: tensor.half() for key, tensor in net.state_dict().items()}, tmp_path / "half.pth")
    check_computes_like(load_network(tmp_path / "half.pth"), net)


def test_empty_averages_count_as_none(tmp_path):
    for averages in (None, {}):
        save_checkpoint(tmp_path / "a.pth", state_dict=build(**NARROW).state_dict(), ema=averages)
        assert load_checkpoint(tmp_path / "a.pth").keys() == {"state_dict"}


@pytest.mark.parametrize("name, heads", [*((name, (1, 2, 4)) for name in ABLATIONS), ("published", None)])
def test_trained_ablations_load_with_their_options(tmp_path, name, heads):
    """Also with all eight options, as earlier versions wrote them for each network, the published ones included."""
    net = build(**NARROW, heads=heads, **ABLATIONS[name])
    for options in (net.options, {**DEFAULTS, **net.options}):
        save_checkpoint(tmp_path / "a.pth", epoch=3, state_dict=net.state_dict(), options=options)
        check_computes_like(load_network(tmp_path / "a.pth"), net)


def test_weights_are_exported_in_half_precision(tmp_path):
    raw, averaged = (build(**NARROW).state_dict() for _ in range(2))
    save_checkpoint(tmp_path / "both.pth", epoch=1, state_dict=raw, ema=averaged, optimizer={"state": {}})
    checkpoint.main([str(tmp_path / "both.pth"), str(tmp_path / "half.pth")])
    content = torch.load(tmp_path / "half.pth", weights_only=True)
    assert content.keys() == {"state_dict", "options"} and content["state_dict"].keys() == raw.keys()
    assert all(torch.equal(tensor, averaged[name].half()) for name, tensor in content["state_dict"].items())
    assert load_network(tmp_path / "half.pth").output_max.weight.dtype == torch.float32
    with pytest.raises(SystemExit, match=r"both\.pth exists, perhaps with what a run needs"):
        checkpoint.main([str(tmp_path / "half.pth"), str(tmp_path / "both.pth")])


def test_own_weights_are_of_nerd_rain_s():
    assert network_name(load_network(OWN_WEIGHTS)) == "NeRD-Rain-S"


@pytest.mark.parametrize(
    "content, expected",
    [
        (["a", "list"], "expected a dict .* found list"),
        (torch.zeros(3), "expected a dict .* found Tensor"),
        ({"model": {"a": 1}}, "expected a dict .* found dict with .*model"),
        ({0: torch.zeros(1)}, "expected a dict"),
        ({"state_dict": {}}, "expected a dict"),
        ({"state_dict": torch.zeros(3)}, "expected a dict"),
        ({"state_dict": narrow_weights_with(), "ema": [1, 2]}, "expected a dict"),
        ({"state_dict": narrow_weights_with(), "ema": torch.zeros(3)}, "expected a dict"),
        (narrow_weights_with(output_max__weight=torch.zeros(3, 8, 3, 3, device="meta")), "expected a dict"),
        (narrow_weights_with(output_max__weight=torch.zeros(3, 8, 3, 3).to_sparse()), "expected a dict"),
        (narrow_weights_with(output_max__weight=torch.zeros(()).expand(3, 8, 3, 3)), "expected a dict"),
        (narrow_weights_with(output_max__weight=torch.zeros(3, 8, 3, 3).int()), "expected a dict"),
        ({"state_dict": {"conv.weight": torch.zeros(1)}}, r"expected names such as .* found conv\.weight"),
        (narrow_weights_with(output_max__weight=torch.zeros(3, 9, 3, 3)), r"output_max\.weight: expected \(3, 8, 3"),
        (narrow_weights_with(patch_embed_small__proj__weight=torch.zeros(16, 3, 3, 3)), "does not fit .* found"),
        (narrow_weights_with(extra=torch.zeros(2)), r"in 1 weights, such as extra: expected nothing, found \(2,\)"),
        (narrow_weights_with(output_max__weight=torch.full((3, 8, 3, 3), torch.nan)), "not finite"),
        (narrow_weights_with(output_max__weight=torch.full((3, 8, 3, 3), 1e300, dtype=torch.float64)), "not finite"),
        (narrow_weights_with(latent_small__999999999__norm1__body__weight=torch.ones(8)), "more blocks than the"),
        *(
            ({"state_dict": narrow_weights_with(), "options": {**NARROW, **options}}, f"cannot be built .*{reason}")
            for options, reason in [
                ({"num_blocks": (10**9, 1, 1)}, "more blocks than the"),
                ({"num_blocks": (10**9, -(10**9), 1)}, "more blocks than the"),
                ({"passes": (1, 10**9, 1)}, "more blocks than the"),
                ({"num_blocks": (300, 300, 300), "passes": (100, 100, 100)}, "more blocks than the"),
                ({"num_blocks": (1,)}, ""),
                ({"num_blocks": 3}, ""),
                ({"num_blocks": None}, ""),
                ({"passes": (1, 0, 3)}, "passes are three numbers"),
                ({"inr": "magic"}, "inr is one of"),
                ({"inr": ["none"]}, ""),
                ({"dims": 8}, ""),
                ({"dim": -8}, ""),
                ({"dim": 10**12}, ""),
                ({"dim": "8"}, ""),
            ]
        ),
        ({"state_dict": narrow_weights_with(), "options": ["dim"]}, "cannot be built"),
        ({"state_dict": narrow_weights_with(), "options": {**NARROW, "dim": 10**6}}, "does not fit"),
        ({"state_dict": narrow_weights_with(), "options": {**NARROW, "heads": (10**6,) * 3}}, "does not fit"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_files_that_fit_no_network_say_what_was_expected_and_found(tmp_path, content, expected):
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=rf"wrong\.pth .*{expected}"):
        load_network(tmp_path / "wrong.pth")


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    for zipped in (True, False):
        torch.save({"state_dict": Hostile()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"a\.pth cannot be read as a checkpoint \(it holds more than tensors"):
            load_checkpoint(tmp_path / "a.pth")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_damaged_checkpoints_are_named(tmp_path, zipped):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": narrow_weights_with()}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    load_network(path)
    for size in (0, 100, 5000, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a\.pth cannot be read as a checkpoint \(incomplete or damaged\)"):
            load_network(path)
    if zipped:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])  # one bit of a weight
        with pytest.raises(UserError, match="incomplete or damaged"):
            load_network(path)


def test_mutated_checkpoints_are_read_or_refused_with_a_sentence(tmp_path):
    path, rng = tmp_path / "a.pth", np.random.default_rng(0)
    torch.save({"epoch": 1, "state_dict": {"a": torch.zeros(3), "b": torch.ones(2, 2)}}, path)
    data, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(200):
        mutated, places = data.copy(), rng.integers(len(data), size=rng.integers(1, 8))
        mutated[places] = rng.integers(256, size=len(places))
        path.write_bytes(mutated.tobytes())
        try:
            load_checkpoint(path)
        except UserError as error:
            refused += str(path) in str(error)
    assert refused > 50


def test_compressed_checkpoints_are_refused_before_they_are_read(tmp_path, monkeypatch):
    torch.save({"state_dict": narrow_weights_with()}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as stored,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=r"b\.pth cannot be read as a checkpoint \(compressed"):
        load_network(tmp_path / "b.pth")


def test_missing_and_unreadable_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        load_network(tmp_path / "none.pth")
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(UserError, match=r"a\.pth cannot be read as a checkpoint \(Is a directory\)"):
        load_network(tmp_path / "a.pth")


def load_epoch(path):
    return load_checkpoint(path)["epoch"]


def save_epoch(path, epoch, previous=None, **content):
    save_checkpoint(path, previous, epoch=epoch, state_dict={"a": torch.zeros(1)}, **content)


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save_epoch(tmp_path / "model.pth", 1)
    with pytest.raises(AttributeError):
        save_epoch(tmp_path / "model.pth", 2, unpicklable=lambda: None)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match=r"model\.pth cannot be written \(No space left\)"):
        save_epoch(tmp_path / "model.pth", 3)
    assert load_epoch(tmp_path / "model.pth") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_the_newest_intact_checkpoint_is_loaded(tmp_path):
    latest, previous = tmp_path / "latest.pth", tmp_path / "previous.pth"
    assert load_newest(latest, previous) == (None, {}, [])
    for epoch in (1, 2):
        save_epoch(latest, epoch, previous)
    path, content, errors = load_newest(latest, previous)
    assert (path, content["epoch"], errors) == (latest, 2, [])
    latest.write_bytes(latest.read_bytes()[:200])
    path, content, errors = load_newest(latest, previous)
    assert (path, content["epoch"]) == (previous, 1) and "latest.pth cannot be read" in str(errors[0])
    previous.write_text("")
    with pytest.raises(UserError, match=r"latest\.pth cannot .*previous\.pth cannot .*--pretrain_weights"):
        load_newest(latest, previous)
