"""The record of a training run, beside its checkpoints: what was started, a line per epoch, TensorBoard."""

import contextlib
import json
import math
import sys
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from utils.environment import software
from utils.errors import UserError, counted
from utils.files import atomic_write


def describe(arguments, device, processes):
    """What is about to run -> dict."""
    cpu = f"CPU with {counted(torch.get_num_threads(), 'thread')}"
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "arguments": arguments,
        **software(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "processes": processes,
    }


def append(path, content):
    """Adds a line of JSON to a file. Raises UserError if that cannot be written."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free some space.") from error


def whole_lines(path):
    """-> dicts of a file's lines of JSON, without those of which a power cut left a part; none if there is no file."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict):
                found.append(content)
    return found


def rewrite(path, lines):
    """Lets a file of JSON lines hold these alone, if it holds others."""
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if path.is_file() and path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)


class RunLog:
    """Writes runs.jsonl (a line per start), log.jsonl (a line per epoch) and TensorBoard files into a folder.

    A run that goes on after `epochs_done` epochs and `steps_done` steps drops what was logged beyond them.
    """

    def __init__(self, folder, description, epochs_done, steps_done):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, starts = folder / "log.jsonl", folder / "runs.jsonl"
        rewrite(self.path, [line for line in whole_lines(self.path) if line.get("epoch", math.inf) <= epochs_done])
        rewrite(starts, whole_lines(starts))
        append(starts, description)
        self.board = SummaryWriter(folder, purge_step=steps_done)

    def epoch(self, line, step):
        """Logs an epoch: `line` maps names to numbers, "epoch" among them."""
        append(self.path, line)
        for name, value in line.items():
            self.board.add_scalar(f"epoch/{name}", value, step)

    def losses(self, terms, step):
        for name, value in terms.items():
            self.board.add_scalar(f"loss/{name}", value, step)

    def panels(self, rows, step):
        """Shows pictures, each row a list of 3×H×W tensors in [0, 1] of one size."""
        self.board.add_image(
            "rainy, derained, clean", make_grid([picture for row in rows for picture in row], nrow=len(rows[0])), step
        )
