"""What the network is trained and validated on: patches of paired pictures, and their order."""

import atexit
import math
import multiprocessing
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.functional import adjust_saturation, center_crop

from utils.pictures import read_image, reflect_pad
from utils.rain import add_rain


class Photo(NamedTuple):
    """Path of a photograph without rain, to which training adds synthetic rain."""

    input: Path

    def read(self):
        """-> the photograph twice, H×W×3 uint8."""
        image = read_image(self.input)
        return image, image


MOVES = [  # nine equally likely moves, two of which leave the patch alone
    lambda image: image,
    np.flipud,
    np.fliplr,
    lambda image: np.rot90(image, 1),
    lambda image: np.rot90(image, 2),
    lambda image: np.rot90(image, 3),
    lambda image: np.rot90(np.flipud(image)),
    lambda image: np.rot90(np.fliplr(image)),
    lambda image: image,
]


def to_uint8_tensor(image):
    """H×W×3 -> 3×H×W, both uint8: workers send 8 bits, and the device makes them float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class TrainingPatches(Dataset):
    """Randomly cropped and augmented patches: dicts of "input" and "target", 3×P×P uint8, and the file's "name".

    Indices count the samples of a whole run, epoch · len(self) + picture. They seed all random choices, so a sample
    does not depend on workers, on processes or on where a run was interrupted.

    Args:
        pairs: of utils.pairs.Pair, or Photo, whose patches get synthetic rain, another in every epoch
        patch_size: P in pixels; smaller pictures are padded by reflection
    """

    def __init__(self, pairs, patch_size, seed):
        self.pairs, self.patch_size, self.seed = pairs, patch_size, seed

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        pair, size = self.pairs[index % len(self)], self.patch_size
        rainy, clean = (reflect_pad(image, size, size) for image in pair.read())
        # Saturation changes each pixel alone: adjusting it after the crop gives what the published order gives.
        saturation = rng.uniform(0.8, 1.2) if rng.integers(3) == 1 else None
        y, x = (rng.integers(side - size + 1) for side in rainy.shape[:2])
        move = MOVES[rng.integers(9)]
        rainy, clean = (move(image[y : y + size, x : x + size]) for image in (rainy, clean))
        if isinstance(pair, Photo):
            rainy = add_rain(clean, rng)
        rainy, clean = to_uint8_tensor(rainy), to_uint8_tensor(clean)
        if saturation:  # in 8 bits, as published
            rainy, clean = (adjust_saturation(patch, saturation) for patch in (rainy, clean))
        return {"input": rainy, "target": clean, "name": str(pair.input)}


class ValidationPatches(Dataset):
    """The central patch of each pair, as in the published validation; items as in TrainingPatches."""

    def __init__(self, pairs, patch_size):
        self.pairs, self.patch_size = pairs, patch_size

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pair, size = self.pairs[index], self.patch_size
        rainy, clean = (reflect_pad(image, size, size) for image in pair.read())
        rainy, clean = (center_crop(to_uint8_tensor(image), size) for image in (rainy, clean))
        return {"input": rainy, "target": clean, "name": str(pair.input)}


class EpochSampler(Sampler):
    """Shuffles `size` pictures anew for each `epoch` and deals out its batches, from batch `skip` on, to the processes:
    yields lists of indices of TrainingPatches.

    Together the processes see each picture once, in the batches that a single process would see. A process for which
    a batch has no picture left takes the batch's first one, so that all take equally many steps; `counts` leaves it
    out.
    """

    def __init__(self, size, batch_size, seed, rank=0, world=1):
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.epoch = self.skip = 0

    def __len__(self):
        return math.ceil(self.size / self.batch_size)

    def __iter__(self):
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for batch in (order + self.epoch * self.size).split(self.batch_size)[self.skip :]:
            yield (batch[self.rank :: self.world] if self.rank < len(batch) else batch[:1]).tolist()

    def counts(self, number):
        """-> how many pictures of an epoch's batch `number` this process has, and all processes together."""
        count = min(self.batch_size, self.size - number * self.batch_size)
        return len(range(self.rank, count, self.world)), count


def ignore_signals(_):
    """Makes a worker ignore signals that terminals and schedulers send to a whole group of processes: the main process
    saves, and its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # not on Windows
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """multiprocessing would end remaining workers with the SIGTERM that they ignore, and wait for them."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would report their end as a failure
        for worker in workers:
            worker.kill()
