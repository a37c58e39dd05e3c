"""Reference numbers of the published implementation, and the inputs and weights they belong to.

Every array is a pure function of its name, so that only results are stored (see tests/reference/README.md).
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

import ablations

FOLDER = Path(__file__).parent / "reference"
NUMBERS = json.loads((FOLDER / "golden.json").read_text())
METRICS = json.loads((FOLDER / "metrics.json").read_text())
ARRAYS = np.load(FOLDER / "golden.npz")
NETWORKS = {  # name in the reference files -> name of the network
    "nerd_rain": "NeRD-Rain",
    "nerd_rain_s": "NeRD-Rain-S",
    "nerd_rain_mprnet": "NeRD-Rain-MPRNet",
}


def generator(name):
    return np.random.RandomState(zlib.crc32(name.encode()))


def golden_input(name, *shape):
    return torch.from_numpy(generator(name).random_sample(shape).astype(np.float32))


def golden_weight(key, shape):
    if key.endswith("body.1.weight") and list(shape) == [1]:
        return torch.full((1,), 0.25)
    z = generator(key).standard_normal(shape).astype(np.float32)
    if key.endswith("temperature") or (".norm" in key and key.endswith("weight")):
        z = 1 + 0.1 * z
    elif key.endswith("bias"):
        z = 0.1 * z
    else:
        z = 0.6 * z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


@functools.cache
def golden_weights(name):
    return {key: golden_weight(key, shape) for key, shape in NUMBERS[name]["state_dict"].items()}


def build(name):
    return ablations.build(**ablations.NETWORKS[NETWORKS[name]])


def golden_network(name):
    net = build(name)
    net.load_state_dict(golden_weights(name), strict=True)
    return net
