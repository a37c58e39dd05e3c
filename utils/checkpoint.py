"""Checkpoints: one way to write them, one way to read them. The format is the published one: a dict with "epoch",
"state_dict" and "optimizer"; ours add "ema" (averaged weights) and what an exact resume needs.

python -m utils.checkpoint model_best.pth weights.pth      keeps the weights alone, in half precision, to pass them on
"""

import argparse
import re
import zipfile
from pathlib import Path

import torch

from model import MultiscaleNet
from utils.errors import UserError, reports_errors
from utils.files import atomic_write

OWN_WEIGHTS = Path(__file__).parent.parent / "checkpoints" / "nerd_rain_s.pth"  # part of this repository
PUBLISHED = {
    (48, (2, 3, 3), (1, 2, 4)): "NeRD-Rain",
    (32, (2, 3, 3), (1, 2, 4)): "NeRD-Rain-S",
    (48, (1, 1, 1), None): "NeRD-Rain-MPRNet",
}
# what ablations change
DEFAULTS = {"passes": (1, 2, 3), "inr": "published", "feedback": "bfpu", "own_reduce": False, "antialias": False}


def save_checkpoint(path, previous=None, **content):
    """Writes a checkpoint dict to `path`; the file that it replaces is kept as `previous`, if that is given."""
    with atomic_write(path, previous) as file:
        torch.save(content, file)


def load_checkpoint(path):
    """Reads a checkpoint dict onto the CPU; weights of DataParallel lose their "module." prefix.

    Nothing but tensors and plain containers is unpickled. Raises UserError for a file that is no checkpoint.
    """
    try:
        if zipfile.is_zipfile(path):  # not what PyTorch wrote before 1.6
            with zipfile.ZipFile(path) as archive:
                if any(file.compress_type != zipfile.ZIP_STORED for file in archive.infolist()):
                    raise ValueError("it is compressed, as torch.save never does")  # megabytes could become gigabytes
                if damaged := archive.testzip():  # torch does not look at the check sums
                    raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a .pth file that train.py wrote or that was released.") from None
    except Exception as error:  # what torch raises on a broken file depends on where it is broken
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error):  # torch advises to switch the check off, which runs what the file says
            reason = "it holds something else than tensors, or is no PyTorch file"
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): download or copy it again.") from error
    parts = content if isinstance(content, dict) and "state_dict" in content else {"state_dict": content}
    if parts.get("ema", {}) in (None, {}):
        parts = {name: part for name, part in parts.items() if name != "ema"}
    weights = {name: parts[name] for name in ("state_dict", "ema") if name in parts}
    if not all(map(holds_weights, weights.values())):
        raise UserError(
            f'{path} is not a checkpoint of NeRD-Rain: expected a dict whose "state_dict" maps names to tensors, '
            f"found {type(content).__name__}{f' with {list(content)[:3]}' if isinstance(content, dict) else ''}."
        )
    for name, part in weights.items():
        parts[name] = {key.removeprefix("module."): tensor for key, tensor in part.items()}
    return parts


def load_newest(*paths):
    """Reads the first of these checkpoints that is there and whole -> its path, its content, and the errors of those
    before it. None, {} and [] if there are none; raises UserError if none of those that there are is whole."""
    errors = []
    for path in paths:
        if path.exists():
            try:
                return path, load_checkpoint(path), errors
            except UserError as error:
                errors.append(error)
    if errors:
        best = "--pretrain_weights model_best.pth starts from the best weights so far"
        raise UserError(f"{' '.join(map(str, errors))} To begin again, move what is broken away; {best}.")
    return None, {}, []


def holds_weights(part):
    """Whether something is a dict of names and dense floating-point tensors."""
    return (
        isinstance(part, dict)
        and bool(part)
        and all(
            isinstance(name, str)
            and torch.is_tensor(tensor)
            and tensor.device.type == "cpu"  # not "meta", which has shapes only
            and tensor.layout == torch.strided
            and tensor.is_floating_point()
            for name, tensor in part.items()
        )
    )


def options_of(weights, path):
    """The arguments of MultiscaleNet to which a state dict belongs, read from its names and shapes."""
    try:
        dim = len(weights["patch_embed_small.proj.weight"])
        levels = ("encoder_level1_small", "encoder_level2_small", "latent_small")
        num_blocks = tuple(
            1 + max(int(found[1]) for name in weights if (found := re.match(rf"{level}\.(\d+)\.", name)))
            for level in levels
        )
        heads = tuple(len(weights[f"{level}.0.attn.temperature"]) for level in levels if is_transformer(weights))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} holds no weights of NeRD-Rain: expected names such as patch_embed_small.proj.weight, "
            f"found {', '.join(list(weights)[:3])}."
        ) from None
    return {"dim": dim, "num_blocks": num_blocks, "heads": heads or None}


def is_transformer(weights):
    return any(name.endswith("attn.temperature") for name in weights)


def network_name(net):
    """-> the published name, and what an ablation changed of it."""
    kind, changed = (net.options[name] for name in ("dim", "num_blocks", "heads")), []
    for name, default in DEFAULTS.items():
        if net.options[name] != default:
            changed.append(f"{name} {net.options[name]}")
    name = PUBLISHED.get(tuple(kind), "a network of width {dim}, blocks {num_blocks}".format(**net.options))
    return ", ".join([name, *changed])


def build_network(content, path):
    """The network to which a checkpoint belongs, with its weights in float32, averaged ones where it has them.

    Which one it is, is read from names and shapes, and what these do not tell from "options", if that is there. Raises
    UserError with the names and shapes that do not fit.
    """
    weights = content.get("ema") or content["state_dict"]
    options = content.get("options") or options_of(weights, path)
    try:
        blocks, passes = (sum(map(abs, options.get(name, DEFAULTS.get(name, ())))) for name in ("num_blocks", "passes"))
        if passes * (1 + blocks) > len(weights):  # each pass has weights of its own, and so have its blocks
            raise ValueError(f"it would have more blocks than the file has weights, which are {len(weights)}")
        with torch.device("meta"):  # no memory and no random numbers before the file is known to fit
            net = MultiscaleNet(**options)
    except Exception as error:  # options that mean no good fail in many ways
        raise UserError(
            f"{path} describes a network that cannot be built ({error}): download or copy it again."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        examples = "; ".join(
            f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
            for name in wrong[:3]
        )
        raise UserError(f"{path} does not fit {network_name(net)} in {len(wrong)} weights, such as {examples}.")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(
            f"{path} holds weights that are not finite numbers: its training diverged, choose an earlier one."
        )
    net.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return net


def load_network(path):
    """The network in a checkpoint, on the CPU; which one it is (`network_name`) is recognised from the file."""
    return build_network(load_checkpoint(path), path)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Keeps the weights that test.py would use, in half precision.")
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    args = parser.parse_args(argv)
    if Path(args.output).exists():
        raise UserError(f"{args.output} is there already, perhaps with what a run needs to go on: choose another name.")
    net = load_network(args.checkpoint)
    weights = {name: tensor.half() for name, tensor in net.state_dict().items()}
    save_checkpoint(args.output, state_dict=weights, options=net.options)


if __name__ == "__main__":
    main()
