import os
import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from ablations import build
from utils.checkpoint import save_checkpoint
from utils.pictures import write_png

ROOT = Path(__file__).parent.parent
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Only tests marked `gpu` see GPUs: all others compare with numbers of the CPU. One thread, here and in the scripts
    that tests start, lets no sum depend on the number of cores. A launcher's variables would make them wait for others.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def narrow_weights(tmp_path_factory):
    """A checkpoint of a narrow network, which the scripts recognise and run quickly."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "narrow.pth"
    save_checkpoint(path, epoch=1, state_dict=build(dim=8, num_blocks=(1, 1, 1)).state_dict())
    return path


def make_pairs(root, count=6, size=(40, 48), seed=0):
    """Writes `count` random pairs to root/input and root/target."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        clean = rng.integers(0, 200, (*size, 3), dtype=np.uint8)
        write_png(root / "target" / f"{number}.png", clean)
        write_png(root / "input" / f"{number}.png", clean + rng.integers(0, 55, clean.shape, dtype=np.uint8))
    return root


def failure(function, *arguments):
    """-> the sentence or the status that a script ends with."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    return str(caught.value.code)


@pytest.fixture
def pairs_folder(tmp_path):
    return make_pairs(tmp_path / "pairs")


@pytest.fixture(autouse=True)
def seeded():
    """Random weights are the same whichever tests ran before in the process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals_restored():
    """train.py takes over Ctrl-C, SIGTERM and SIGHUP."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # not on Windows
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
