"""Deraining pictures of any size: by the windows of the published test procedure, by blended tiles, or whole."""

import functools
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from model import MULTIPLE
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.devices import choose_device, strict_float32, usable_cores
from utils.errors import UserError
from utils.formats import (
    KEPT_MODES,
    QUALITY,
    channels_of,
    from_channels,
    in_png,
    read_picture,
    to_channels,
    write_picture,
)
from utils.huge import derain_huge, is_huge
from utils.images import reflect_pad, to_image, to_tensor

MODES = ("window", "tile", "whole")
WINDOW = 256  # pixels; what the paper's tables were made with
LARGE = 2**20  # pixels; above it, tiles are the default, below it the windows of the published tables
GPU_BATCH = 8  # windows
OVERSHOOT = 0.2  # beyond [0, 1], as resizing leaves it in floating-point pictures


def window_spans(side, window):
    """Windows along one side of a picture, as published -> list of (start, weights of its pixels). They lie on a grid
    from 0; where that does not end at the edge, a last one is taken flush with it and only its uncovered strip used."""
    grid = [(start, np.ones(window, np.float32)) for start in range(0, side - window + 1, window)]
    covered = len(grid) * window
    if covered == side:
        return grid
    return [*grid, (side - window, (np.arange(side - window, side) >= covered).astype(np.float32))]


def tile_spans(side, tile, overlap):
    """Evenly spread tiles along one side, which overlap by at least that -> list of (start, weights of its pixels). The
    weights fade linearly over an overlap, and those of all tiles sum to 1 in every pixel."""
    count = max(1, -(-(side - overlap) // (tile - overlap)))
    starts = [round(start) for start in np.linspace(0, side - tile, count)]
    inside = np.minimum(np.arange(tile) + 0.5, np.arange(tile)[::-1] + 0.5)  # distance to the tile's edge
    fade = np.minimum(inside / max(overlap, 0.5), 1)
    total = np.zeros(side)
    for start in starts:
        total[start : start + tile] += fade
    return [(start, (fade / total[start : start + tile]).astype(np.float32)) for start in starts]


class Piece(NamedTuple):
    """What of a picture runs through the network at once."""

    pixels: torch.Tensor  # 3×h×w in [0, 1]
    canvas: "Canvas"  # takes the result


class Canvas:
    """The result of one picture, of which no more is held than one row of windows.

    Pieces come row by row, from left to right; each is added with its weights, and rows that no later window reaches
    are handed out.

    Args:
        key: whatever names the picture
        image: H×W×3 array, or anything that has such a shape and a dtype and can be sliced
        spans: of (height or width) -> the windows along it
        sides: (height, width) that the picture is brought to by reflection
    """

    def __init__(self, key, image, spans, sides):
        self.key, self.height, self.width, self.dtype = key, *image.shape[:2], image.dtype
        self.image = image if sides == image.shape[:2] else reflect_pad(np.asarray(image), *sides)
        self.rows, self.columns = map(spans, sides)
        self.places = ((row, column) for row in range(len(self.rows)) for column in range(len(self.columns)))
        self.sums = torch.zeros(3, len(self.rows[0][1]), sides[1])  # of the current row of windows

    def pieces(self):
        for top, row_weights in self.rows:
            band = self.image[top : top + len(row_weights)]
            for left, column_weights in self.columns:
                yield Piece(to_tensor(band[:, left : left + len(column_weights)]), self)

    def add(self, result):
        """Takes the next piece's result 3×h×w -> rows of the picture that are finished, n×W×3, or None."""
        row, column = next(self.places)
        (top, row_weights), (left, column_weights) = self.rows[row], self.columns[column]
        weights = torch.from_numpy(row_weights[:, None] * column_weights)
        self.sums[:, :, left : left + len(column_weights)] += result * weights
        if column < len(self.columns) - 1:
            return None
        last = row == len(self.rows) - 1
        done = len(row_weights) if last else self.rows[row + 1][0] - top
        finished = to_image(self.sums[:, :done], self.dtype)[: self.height - top, : self.width]
        self.sums = torch.cat([self.sums[:, done:], torch.zeros_like(self.sums[:, :done])], dim=1)
        return finished


def ahead(items, count):
    """Hands an iterator's items on, `count` of them later than it takes them."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def grouped(pieces, size):
    """Pieces in order -> lists of at most `size` neighbours of equal shape."""
    group = []
    for piece in pieces:
        if group and (len(group) == size or piece.pixels.shape != group[0].pixels.shape):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


class Derainer:
    """Derains pictures of any size with one network.

    Pictures are H×W×3 RGB arrays, uint8, uint16 or float32 in [0, 1]; results have the same size and type.

    Args:
        net: the network, on its device; it is put into evaluation mode and channels-last format
        mode: "window": windows of the published test procedure, each by itself; a side shorter than the window is
            reflected to the next multiple of 16. "tile": overlapping windows, blended without seams. "whole": the
            picture at once. None chooses windows up to a megapixel and tiles above.
        window: side of windows and tiles, a multiple of 16. It changes results a little, as channel attention sees all
            of a window.
        bf16: computes in bfloat16: faster, and some values change by a level or two
        ensemble: averages the results of the eight turned and mirrored pictures, in eight times the time; only for
            weights that know rain from all sides, as this repository's own do not
        fused: fused kernels and CUDA graphs (utils/fused.py)
    """

    def __init__(self, net, mode=None, window=WINDOW, bf16=False, ensemble=False, fused=False):
        if window < MULTIPLE or window % MULTIPLE:
            raise ValueError(f"the window must be a multiple of {MULTIPLE}, not {window}")
        if mode not in (None, *MODES):
            raise ValueError(f"the mode must be one of {', '.join(MODES)}, not {mode}")
        self.net = net = net.to(memory_format=torch.channels_last).eval()
        self.mode, self.window, self.bf16 = mode, window, bf16
        self.device = next(net.parameters()).device
        gpu = self.device.type == "cuda"
        self.batch = GPU_BATCH if gpu else 1
        self.threads = min(8, usable_cores()) if gpu else 1
        self.forward = self.plain
        if fused:
            if not gpu:
                raise UserError("the fused kernels need an NVIDIA GPU: leave --fused away.")
            from utils.fused import GraphedNetwork, fuse_blocks  # Triton comes with PyTorch for GPUs only

            net = fuse_blocks(net, torch.bfloat16 if bf16 else torch.float32)
            self.forward = GraphedNetwork(net, bf16)
        if ensemble:
            self.forward = self.eightfold(self.forward)

    def plain(self, x):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.net(x)[0].float()

    @staticmethod
    def eightfold(forward):
        """The mean over the eight symmetries of a square (the geometric self-ensemble of EDSR, arXiv 1707.02921)."""

        def run(x):
            total = 0
            for turns in range(4):
                for flip in ((), (3,)):
                    turned = torch.rot90(x, turns, (2, 3)).flip(flip).contiguous(memory_format=torch.channels_last)
                    total = total + torch.rot90(forward(turned).flip(flip), -turns, (2, 3))
            return total / 8

        return run

    def canvas(self, key, image):
        height, width = image.shape[:2]
        mode, window = self.mode or ("tile" if height * width > LARGE else "window"), self.window

        def padded(side):
            return -(-side // MULTIPLE) * MULTIPLE if mode == "whole" or side < window else side

        def spans(side):
            size = side if mode == "whole" else min(window, side)
            return window_spans(side, size) if mode != "tile" else tile_spans(side, size, size // 8)

        return Canvas(key, image, spans, (padded(height), padded(width)))

    def launch(self, group):
        batch = torch.stack([piece.pixels for piece in group])
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with torch.inference_mode(), strict_float32():
            return group, self.forward(batch)

    @staticmethod
    def collect(group, results):
        for piece, result in zip(group, results.cpu()):
            rows = piece.canvas.add(result)
            if rows is not None:
                yield piece.canvas, rows

    def stream(self, pictures):
        """Iterable of (key, picture) -> (canvas, next finished rows of its result), in order. Windows of several
        pictures share a batch, and a GPU computes one batch while the one before is collected."""
        pieces = (piece for key, image in pictures for piece in self.canvas(key, image).pieces())
        running = ()
        for group in grouped(pieces, self.batch):
            launched = self.launch(group)
            if running:
                yield from self.collect(*running)
            running = launched
        if running:
            yield from self.collect(*running)

    def pictures(self, pictures):
        """Iterable of (key, picture) -> (key, result), in order."""
        for canvas, bands in itertools.groupby(self.stream(pictures), key=lambda item: item[0]):
            yield canvas.key, np.concatenate([rows for _, rows in bands])

    def files(self, paths, finish):
        """Derains picture files -> (path, what finish(path, picture, result) returned, given two Pictures), or the
        UserError that it or reading raised; those that cannot be read last. Threads read ahead of the network and
        finish behind it."""
        broken = []  # files that could not be read, as (path, future)
        pool = ThreadPoolExecutor(self.threads)

        def readable():
            for path, future in ahead(((path, pool.submit(read_picture, path)) for path in paths), self.threads):
                if future.exception():
                    broken.append((path, future))
                else:
                    yield (path, future.result()), future.result().pixels

        def finishing():
            for (path, picture), derained in self.pictures(readable()):
                yield path, pool.submit(finish, path, picture, picture._replace(pixels=derained))
            yield from broken

        try:
            for path, future in ahead(finishing(), self.threads):
                try:
                    yield path, future.result()
                except UserError as error:
                    yield path, error
        finally:
            pool.shutdown(cancel_futures=True)

    def __call__(self, image):
        """Derains one picture."""
        return next(self.pictures([(None, image)]))[1]


@functools.lru_cache(maxsize=1)
def load_derainer(weights, changed, gpus, options):
    """The Derainer of a checkpoint; `changed`, its time of change, keeps a newer one from being taken for it."""
    return Derainer(load_network(weights).to(choose_device(gpus)), **dict(options))


def derain(
    image: np.ndarray | Image.Image | str | os.PathLike,
    weights: str | os.PathLike = OWN_WEIGHTS,
    output: str | os.PathLike | None = None,
    gpus: str | int | None = None,
    **options,
) -> np.ndarray | Image.Image | Path:
    """Derains a picture and returns one of the same kind. For many files, clips or networks use Derainer itself, which
    test.py does too.

    Args:
        image: an array H×W, H×W×1 to 4 (grey or RGB, the last of 2 or 4 is alpha, which stays as it is), uint8, uint16
            or floating-point in [0, 1]; a Pillow image; or the path of a picture file, whose result is written to
            `output` (to `output`.png where the format of its ending cannot hold it) and whose path is returned
        weights: a checkpoint, by default this repository's own; it stays loaded for the next call
        output: where the result of a file goes, a file or a folder, by default results/<its name>.png
        gpus: number of the GPU, or "cpu"; by default a GPU if there is one
        options: mode, window, bf16, ensemble and fused, as Derainer takes them

    Raises UserError for a file that cannot be read or written, and ValueError for an array of another kind.
    """
    changed = os.stat(weights).st_mtime_ns if os.path.exists(weights) else None
    derainer = load_derainer(os.fspath(weights), changed, gpus, tuple(sorted(options.items())))
    if isinstance(image, str | os.PathLike):
        path, name = Path(image), Path(image).stem + ".png"
        output = Path(output or Path("results", name))
        output = output / name if output.is_dir() else output
        if path.resolve() in (output.resolve(), in_png(output).resolve()):
            raise UserError(f"{path}: its result would overwrite it, choose another output.")
        if is_huge(path):
            return derain_huge(derainer, path, output, QUALITY)
        picture = read_picture(path)
        return write_picture(output, picture._replace(pixels=derainer(picture.pixels)))
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        pixels = np.asarray(upright) if upright.mode == "F" else channels_of(upright)
        result = Image.fromarray(derain_array(derainer, pixels))
        if upright.mode in KEPT_MODES and "icc_profile" in upright.info:
            result.info["icc_profile"] = upright.info["icc_profile"]
        return result
    derained = derain_array(derainer, image)
    return derained.reshape(image.shape)


def derain_array(derainer, pixels):
    """An array as `derain` takes it -> its result, H×W or H×W×2 to 4. Raises ValueError for one of another kind."""
    if not isinstance(pixels, np.ndarray):
        raise ValueError(f"expected a NumPy array, a Pillow image or a file's path, not {type(pixels).__name__}")
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or not 1 <= np.atleast_3d(pixels).shape[2] <= 4:
        raise ValueError(f"expected a picture, H×W or H×W×1 to 4; not an array of shape {pixels.shape}")
    if pixels.dtype not in (np.uint8, np.uint16) and not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"expected values of type uint8, uint16 or floating-point in [0, 1], not {pixels.dtype}")
    if np.issubdtype(pixels.dtype, np.floating) and not (pixels.min() >= -OVERSHOOT and pixels.max() <= 1 + OVERSHOOT):
        raise ValueError(f"expected values in [0, 1], found {pixels.min()} to {pixels.max()}: divide 8-bit ones by 255")
    picture = from_channels(np.atleast_3d(pixels), {})
    return to_channels(picture._replace(pixels=derainer(picture.pixels)))
