"""Checkpoints: the only place where they are written, read and checked. The format is the published one, a dict with
"epoch", "state_dict" and "optimizer"; ours add "ema" (averaged weights), "options" of the network, and what an exact
resume needs.

python -m utils.checkpoint model_best.pth weights.pth      exports the weights alone, in half precision, to share them
"""

import argparse
import re
import zipfile
from pathlib import Path

import torch

from ablations import DEFAULTS, build, network_name
from utils.files import UserError, atomic_write, reports_errors

OWN_WEIGHTS = Path(__file__).parent.parent / "checkpoints" / "nerd_rain_s.pth"  # part of this repository


def save_checkpoint(path, previous=None, **content):
    """Writes a checkpoint dict to `path`; `previous` keeps the file that it replaces."""
    with atomic_write(path, previous) as file:
        torch.save(content, file)


def load_checkpoint(path):
    """Reads a checkpoint dict onto the CPU; prefixes of DataParallel and torch.compile are stripped from its names.

    Only tensors and plain containers are unpickled. Raises UserError for a file that is no checkpoint.
    """
    try:
        if zipfile.is_zipfile(path):  # the format since PyTorch 1.6
            with zipfile.ZipFile(path) as archive:
                compressed = any(file.compress_type != zipfile.ZIP_STORED for file in archive.infolist())
                # torch.save never compresses, and megabytes could become gigabytes; torch.load checks no checksums.
                if compressed or archive.testzip():
                    raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a .pth file that train.py wrote or that was released.") from None
    except Exception as error:  # what torch raises on a broken file depends on where it is broken
        reason = "incomplete or damaged"
        if "weights_only" in str(error):  # torch advises to disable the check, which would run code from the file
            reason = "it holds more than tensors, or is no PyTorch file"
        elif isinstance(error, OSError) and error.filename:
            reason = error.strerror
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): download or copy it again.") from error
    parts = dict(content) if isinstance(content, dict) and "state_dict" in content else {"state_dict": content}
    for name in parts.keys() & {"state_dict", "ema"}:
        if not holds_weights(parts[name]):
            found = list(content)[:3] if isinstance(content, dict) else type(content).__name__
            raise UserError(
                f'{path} is not a checkpoint of NeRD-Rain: expected a dict whose "state_dict" maps names to tensors, '
                f"found {found}."
            )
        parts[name] = {re.sub(r"^((module|_orig_mod)\.)+", "", key): tensor for key, tensor in parts[name].items()}
    return parts


def holds_weights(part):
    """Whether this is a dict of names and floating-point tensors on the CPU, all of whose elements are stored."""
    if not isinstance(part, dict) or not part:
        return False
    return all(
        isinstance(name, str)
        and torch.is_tensor(tensor)
        and tensor.device.type == "cpu"  # not "meta", which has no data
        and tensor.layout == torch.strided
        and tensor.is_floating_point()
        and tensor.nbytes <= tensor.untyped_storage().nbytes()  # not expanded: kilobytes could become gigabytes
        for name, tensor in part.items()
    )


def load_newest(*paths):
    """Reads the first of these checkpoints that is intact -> its path, its content, and the errors of those before it;
    None, {} and [] if none exists. Raises UserError if all that exist are damaged."""
    errors = []
    for path in paths:
        if path.exists():
            try:
                return path, load_checkpoint(path), errors
            except UserError as error:
                errors.append(error)
    if errors:
        raise UserError(
            f"{' '.join(map(str, errors))} To start anew, move the damaged files away; --pretrain_weights "
            "model_best.pth starts from the best weights so far."
        )
    return None, {}, []


def options_of(weights, path):
    """-> the options of ablations.build for a state dict, inferred from its names and shapes."""
    levels = ("encoder_level1_small", "encoder_level2_small", "latent_small")
    try:
        dim = len(weights["patch_embed_small.proj.weight"])
        num_blocks, heads = [], []
        for level in levels:
            num_blocks.append(1 + max(int(name.split(".")[1]) for name in weights if name.startswith(f"{level}.")))
            if f"{levels[0]}.0.attn.temperature" in weights:
                heads.append(len(weights[f"{level}.0.attn.temperature"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} holds no weights of NeRD-Rain: expected names such as patch_embed_small.proj.weight, "
            f"found {', '.join(list(weights)[:3])}."
        ) from None
    return {"dim": dim, "num_blocks": num_blocks, "heads": heads or None}


def build_network(content, path):
    """The network in a checkpoint dict, with its weights in float32, the averaged ones if it has them.

    Options come from the checkpoint, or are inferred from names and shapes. Raises UserError with the names and shapes
    that do not fit.
    """
    weights = content.get("ema") or content["state_dict"]
    options = content.get("options") or options_of(weights, path)
    try:
        options = {**DEFAULTS, **options}
        blocks, passes = sum(map(abs, options["num_blocks"])), sum(map(abs, options["passes"]))
        if passes * (1 + blocks) > len(weights):  # each pass has weights of its own, and so have its blocks
            raise ValueError(f"more blocks than the {len(weights)} weights in the file")
        with torch.device("meta"):  # no memory and no random numbers before the file is known to fit
            net = build(**options)
    except Exception as error:  # malformed options
        raise UserError(f"{path} describes a network that cannot be built ({error}): download it again.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        example = f"{wrong[0]}: expected {expected.get(wrong[0], 'nothing')}, found {found.get(wrong[0], 'nothing')}"
        raise UserError(f"{path} does not fit {network_name(net)} in {len(wrong)} weights, such as {example}.")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path} holds weights that are not finite: training diverged, choose an earlier checkpoint.")
    net.load_state_dict(weights, assign=True)
    return net


def load_network(path):
    """The network in a checkpoint file, on the CPU; `ablations.network_name` names it."""
    return build_network(load_checkpoint(path), path)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Exports the weights that test.py would use, in half precision.")
    parser.add_argument("checkpoint", help="a .pth file that train.py wrote")
    parser.add_argument("output", type=Path, help="the .pth file to write")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"{args.output} exists, perhaps with what a run needs to continue: choose another name.")
    net = load_network(args.checkpoint)
    weights = {name: tensor.half() for name, tensor in net.state_dict().items()}
    save_checkpoint(args.output, state_dict=weights, options=net.options)


if __name__ == "__main__":
    main()
