import os
import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from ablations import NETWORKS, build
from utils import weights
from utils.checkpoint import load_network, save_checkpoint
from utils.pictures import write_png

ROOT = Path(__file__).parent.parent
NARROW = {"dim": 8, "num_blocks": (1, 1, 1)}  # a network that runs quickly
NARROW_OPTIONS = ("--dim", "8", "--num_blocks", "1", "1", "1")
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


def save_narrow(path, seed=0):
    """Writes a checkpoint of a narrow network, which the scripts recognise."""
    torch.manual_seed(seed)
    save_checkpoint(path, epoch=1, state_dict=build(**NARROW).state_dict())
    return path


@pytest.fixture(scope="session")
def narrow_weights(tmp_path_factory):
    return save_narrow(tmp_path_factory.mktemp("weights") / "narrow.pth")


@pytest.fixture(scope="session")
def narrow_net(narrow_weights):
    return load_network(narrow_weights)


@pytest.fixture
def narrow_is_published(monkeypatch, tmp_path):
    """The narrow network counts as NeRD-Rain-S, and released weights go to a new folder."""
    monkeypatch.setitem(NETWORKS, "NeRD-Rain-S", NARROW)
    monkeypatch.setattr(weights, "RELEASED", tmp_path / "released")


def random_picture(height, width, seed=0, dtype=np.uint8, channels=3):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


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
def tests_do_not_influence_each_other():
    """Random weights are the same whichever tests ran before. train.py takes over Ctrl-C, SIGTERM and SIGHUP."""
    torch.manual_seed(0)
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # not on Windows
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
