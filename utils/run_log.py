"""The record of a training run, beside its checkpoints: what was started, a line per epoch, TensorBoard."""

import json
import sys
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from utils.environment import software
from utils.errors import UserError
from utils.files import atomic_write


def describe(arguments, device, processes):
    """What is about to run -> dict."""
    gpu = device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "arguments": arguments,
        **software(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU with {torch.get_num_threads()} threads",
        "processes": processes,
    }


def append(path, content):
    """Adds a line of JSON to a file. Raises UserError if that cannot be written."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free some space.") from error


class RunLog:
    """Writes runs.jsonl (a line per start), log.jsonl (a line per epoch) and TensorBoard files into a folder.

    A run that goes on after `epochs_done` epochs and `steps_done` steps drops what was logged beyond them.
    """

    def __init__(self, folder, description, epochs_done, steps_done):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= epochs_done]
        if kept != lines:
            with atomic_write(self.path) as file:
                file.write("".join(kept).encode())
        append(folder / "runs.jsonl", description)
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
