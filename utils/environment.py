"""What a number was made with: versions of the software and facts of the machine."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

import cv2
import numpy
import PIL
import torch
import torchvision


def software():
    """-> dict of the versions that results depend on, and of this repository's commit (None where it is no clone)."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    modules = {"torch": torch, "torchvision": torchvision, "numpy": numpy, "opencv": cv2, "pillow": PIL}
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in modules.items()},
    }


def hardware(device):
    """-> dict of what a time depends on beside the software: processor, threads, memory, GPU."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux tells the processor's name only here
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
