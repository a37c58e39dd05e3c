import os
import zipfile

import numpy as np
import pytest
import torch

from ablations import ABLATIONS, DEFAULTS, build, network_name
from tests import golden
from tests.conftest import NARROW
from utils import checkpoint
from utils.checkpoint import build_network, load_checkpoint, load_network, load_newest, save_checkpoint
from utils.files import UserError


def check_computes_like(net, other):
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert net.options == other.options and torch.equal(net.eval()(x)[0], other.eval()(x)[0])


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_the_network_is_recognised_from_a_released_checkpoint(tmp_path, name):
    weights = golden.golden_weights(name)
    torch.save({"epoch": 5, "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "released.pth")
    net = load_network(tmp_path / "released.pth")
    assert network_name(net) == golden.NETWORKS[name]
    assert all(torch.equal(tensor, weights[key]) for key, tensor in net.state_dict().items())
    assert not all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_parallel_and_compiled_networks_are_stripped(tmp_path, prefix):
    raw, averaged = build(**NARROW), build(**NARROW)
    first, second = ({prefix + name: tensor for name, tensor in net.state_dict().items()} for net in (raw, averaged))
    torch.save({"state_dict": first, "ema": second}, tmp_path / "a.pth")
    content = load_checkpoint(tmp_path / "a.pth")
    check_computes_like(build_network(content, "a.pth"), averaged)
    check_computes_like(build_network({**content, "ema": None}, "a.pth"), raw)


def test_bare_half_precision_weights_of_another_size_are_recognised(tmp_path):
    net = build(dim=8, num_blocks=(1, 2, 1), heads=(1, 2, 2)).half().float()
    torch.save({key: tensor.half() for key, tensor in net.state_dict().items()}, tmp_path / "half.pth")
    check_computes_like(load_network(tmp_path / "half.pth"), net)


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


ZEROS = torch.zeros(3)
TENSORS = [ZEROS.to("meta"), ZEROS.to_sparse(), torch.zeros(()).expand(3), ZEROS.int()]


@pytest.mark.parametrize(
    "content", [["list"], ZEROS, {"model": {"a": 1}}, {0: ZEROS}, {}, *({"a": tensor} for tensor in TENSORS)]
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_is_no_dict_of_weights_is_refused(tmp_path, content):
    for parts in (content, {"state_dict": content}, {"state_dict": build(**NARROW).state_dict(), "ema": content}):
        torch.save(parts, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=r"wrong\.pth is not a checkpoint of NeRD-Rain: expected a dict .* found"):
            load_checkpoint(tmp_path / "wrong.pth")


@pytest.mark.parametrize(
    "name, tensor, expected",
    [
        ("output_max.weight", torch.full((3, 8, 3, 3), torch.nan), "not finite"),
        ("output_max.weight", torch.full((3, 8, 3, 3), 1e300, dtype=torch.float64), "not finite"),
        ("output_max.weight", torch.zeros(3, 9, 3, 3), r"1 weights, such as output_max\.weight: expected \(3, 8, 3, 3"),
        ("patch_embed_small.proj.weight", torch.zeros(16, 3, 3, 3), "does not fit .* found"),
        ("extra", torch.zeros(2), r"in 1 weights, such as extra: expected nothing, found \(2,\)"),
        ("latent_small.999999999.norm1.body.weight", torch.ones(8), "more blocks than the"),
    ],
)
def test_weights_that_fit_no_network_say_what_was_expected_and_found(name, tensor, expected):
    with pytest.raises(UserError, match=rf"wrong\.pth .*{expected}"):
        build_network({"state_dict": build(**NARROW).state_dict() | {name: tensor}}, "wrong.pth")


def test_names_of_another_network_are_shown():
    with pytest.raises(UserError, match=r"expected names such as .* found conv\.weight"):
        build_network({"state_dict": {"conv.weight": torch.zeros(1)}}, "wrong.pth")


@pytest.mark.parametrize(
    "options",
    [
        *({"num_blocks": value} for value in ((10**9, 1, 1), (10**9, -(10**9), 1), (1,), 3, None)),
        *({"passes": value} for value in ((1, 10**9, 1), (1, 0, 3), (1, 2), (1, 2, 3, 4), (-1, 2, 3))),
        {"num_blocks": (300, 300, 300), "passes": (100, 100, 100)},
        *({"dim": value} for value in (-8, 10**6, 10**12, "8")),
        *({"heads": (10**6,) * 3}, {"inr": "magic"}, {"inr": ["none"]}, {"feedback": "x"}, {"dims": 8}, ["dim"]),
    ],
)
def test_options_of_no_network_are_refused(options):
    options = NARROW | options if isinstance(options, dict) else options
    with pytest.raises(UserError, match=r"wrong\.pth (describes a network that cannot be built|does not fit)"):
        build_network({"state_dict": build(**NARROW).state_dict(), "options": options}, "wrong.pth")


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
    torch.save({"state_dict": build(**NARROW).state_dict()}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    middle = len(data) // 2
    one_bit_changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    truncated = [data[:size] for size in (0, 100, 5000, middle, len(data) - 30)]
    for content in [*truncated, *[one_bit_changed] * zipped]:  # the old format has no checksums
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pth cannot be read as a checkpoint \(incomplete or damaged\)"):
            load_network(path)


def test_mutated_checkpoints_are_read_or_refused_with_a_sentence(tmp_path):
    path, rng, refused = tmp_path / "a.pth", np.random.default_rng(0), 0
    save_checkpoint(path, state_dict={"a": torch.zeros(3)})
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(200):
        mutated, positions = data.copy(), rng.integers(len(data), size=rng.integers(1, 8))
        mutated[positions] = rng.integers(256, size=len(positions))
        path.write_bytes(mutated.tobytes())
        try:
            load_checkpoint(path)
        except UserError as error:
            refused += str(path) in str(error)
    assert refused > 50


def test_compressed_checkpoints_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    monkeypatch.setattr(torch, "load", pytest.fail)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", pytest.fail)
    with pytest.raises(UserError, match=r"a\.pth cannot be read as a checkpoint"):
        load_network(tmp_path / "a.pth")


@pytest.mark.parametrize("name, reason", [("none.pth", "does not exist"), ("", r".* \(Is a directory\)")])
def test_missing_and_unreadable_checkpoints_are_named(tmp_path, name, reason):
    with pytest.raises(UserError, match=f"{name} {reason}"):
        load_network(tmp_path / name)


def test_the_newest_intact_checkpoint_is_loaded(tmp_path):
    latest, previous = tmp_path / "latest.pth", tmp_path / "previous.pth"
    assert load_newest(latest, previous) == (None, {}, [])
    for epoch in (1, 2):
        save_checkpoint(latest, previous, epoch=epoch, state_dict={"a": torch.zeros(1)})
    assert load_newest(latest, previous)[::2] == (latest, [])
    os.truncate(latest, 200)
    path, content, errors = load_newest(latest, previous)
    assert (path, content["epoch"]) == (previous, 1) and "latest.pth cannot be read" in str(errors[0])
    previous.write_text("")
    with pytest.raises(UserError, match=r"latest\.pth cannot .*previous\.pth cannot .*--pretrain_weights"):
        load_newest(latest, previous)
