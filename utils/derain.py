"""Deraining pictures of any size, and files: by the published test procedure's windows, by blended tiles, or whole."""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from model import INR, MULTIPLE
from utils import pictures
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.devices import choose_device, strict_float32, usable_cores
from utils.files import UserError, write_json
from utils.pictures import QUALITY, from_channels, peak_value, read_picture, reflect_pad, to_channels, write_picture

MODES = ("window", "tile", "whole")
WINDOW = 256  # pixels; what the paper's tables were made with
GPU_PIXELS = 8 * 256 * 256  # computed at once
OVERSHOOT = 0.2  # beyond [0, 1], as resizing leaves it in floating-point pictures
SETTINGS = "settings.json"  # in the folder of results, how they were made
LOCK = threading.Lock()  # on GPUs: switches of precision are the process's, and a CUDA graph overwrites its last result
logger = logging.getLogger(__name__)


def to_tensor(image):
    """H×W×3 uint8, uint16 or float in [0, 1] -> 3×H×W float32 in [0, 1]."""
    values = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(values) / peak_value(image.dtype)


def to_image(tensor, dtype=np.uint8):
    """3×H×W, clamped to [0, 1] -> H×W×3 of that type; integers are rounded to nearest."""
    values = tensor.clamp(0, 1).permute(1, 2, 0).float().cpu()
    if np.issubdtype(dtype, np.integer):
        values = (values * peak_value(dtype)).round()
    return np.ascontiguousarray(values.numpy().astype(dtype))


def window_spans(side, window):
    """The published windows along one side of a picture -> list of (start, weights of its pixels).

    They lie on a grid from 0; the last one lies flush with the edge, and pixels count in their first window only."""
    starts = [*range(0, side - window, window), side - window]
    ends = [0, *(start + window for start in starts)]
    return [(start, np.float32(np.arange(start, start + window) >= end)) for start, end in zip(starts, ends)]


def tile_spans(side, tile):
    """Evenly spread tiles along one side that overlap by at least an eighth -> list of (start, weights of its pixels).

    Weights fade linearly over an overlap; those of all tiles sum to 1 in every pixel."""
    overlap = tile // 8
    count = -(-(side - overlap) // (tile - overlap))
    starts = [round(start) for start in np.linspace(0, side - tile, count)]
    edge_distance = np.minimum(np.arange(tile) + 0.5, np.arange(tile)[::-1] + 0.5)
    fade = np.minimum(edge_distance / overlap, 1)
    total = np.zeros(side)
    for start in starts:
        total[start : start + tile] += fade
    return [(start, (fade / total[start : start + tile]).astype(np.float32)) for start in starts]


class Canvas:
    """A picture H×W×3 and its result, which windows complete row by row, from left to right.

    Sums of overlapping windows exist for one row of windows only. Rows and columns are spans, as above; where they
    reach beyond the picture, it is padded by reflection.
    """

    def __init__(self, key, image, rows, columns):
        self.key, self.rows, self.columns = key, rows, columns
        self.added, self.count = 0, len(rows) * len(columns)  # windows
        self.result = np.empty(image.shape, image.dtype)
        height, width = (spans[-1][0] + len(spans[-1][1]) for spans in (rows, columns))
        self.image = image if image.shape[:2] == (height, width) else reflect_pad(image, height, width)
        self.sums = torch.zeros(3, len(rows[0][1]), width)

    def windows(self):
        """Yields each window, 3×h×w."""
        for top, row_weights in self.rows:
            for left, column_weights in self.columns:
                yield to_tensor(self.image[top : top + len(row_weights), left : left + len(column_weights)])

    def add(self, derained):
        """Adds the next window's result, 3×h×w."""
        row, column = divmod(self.added, len(self.columns))
        (top, row_weights), (left, column_weights) = self.rows[row], self.columns[column]
        weights = torch.from_numpy(row_weights[:, None] * column_weights)
        self.sums[:, :, left : left + len(column_weights)] += derained * weights
        self.added += 1
        if column < len(self.columns) - 1:
            return
        bottom = top + len(row_weights) if self.added == self.count else self.rows[row + 1][0]
        finished, rest = self.sums[:, : bottom - top], self.sums[:, bottom - top :]
        height, width = self.result.shape[:2]
        self.result[top:bottom] = to_image(finished, self.result.dtype)[: height - top, :width]
        self.sums = torch.cat([rest, torch.zeros_like(finished)], dim=1)


def ahead(items, count):
    """Yields an iterator's items, `count` behind the one taken last: what taking an item starts goes on meanwhile."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def self_ensemble(forward, x):
    """B×3×h×w -> the mean over four mirrorings (geometric self-ensemble, EDSR, arXiv 1707.02921). EDSR's quarter turns
    are left out: with our own weights, which know mostly falling rain, they cost quality."""
    total = 0
    for sides in ((), (3,), (2,), (2, 3)):
        mirrored = x.flip(sides).contiguous(memory_format=torch.channels_last)
        total = total + forward(mirrored).flip(sides)
    return total / 4


def in_bfloat16(net):
    """A copy whose layers have the bfloat16 weights that autocast would otherwise cast in every pass.

    The first layers of INRs stay in float32, as INR.forward sums their weights before autocast casts the sum."""
    net = copy.deepcopy(net)
    summed = {module.imnet.layers[0] for module in net.modules() if isinstance(module, INR)}
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in summed:
            module.bfloat16()
    return net


class Derainer:
    """Derains pictures of any size, H×W×3 RGB arrays of uint8, uint16 or float32 in [0, 1], to results of the same size
    and type.

    Args:
        net: the network, on its device; it is put into evaluation mode and channels-last format
        mode: "tile": overlapping windows, blended without seams. "window": windows of the published test procedure,
            each by itself. "whole": the picture at once. A side shorter than the window is reflected to the next
            multiple of 16.
        window: side of windows and tiles, a multiple of 16. It changes results a little, as channel attention sees all
            of a window.
        bf16: computes in bfloat16: faster, and some values change by a level or two
        ensemble: averages the results of the picture and its three mirror images, in four times the time
        compile: compiles the network for full windows (torch.compile), which takes minutes; smaller pictures run
            without it. Not for mode "whole", where each size of pictures would be compiled anew.

    Raises UserError for options that do not fit.
    """

    def __init__(self, net, mode="tile", window=WINDOW, bf16=False, ensemble=False, compile=False):
        if window < MULTIPLE or window % MULTIPLE:
            raise UserError(f"the side of windows (--win_size) must be a multiple of {MULTIPLE}, not {window}.")
        if mode not in MODES or (compile and mode == "whole"):
            raise UserError(f"the mode must be one of {', '.join(MODES)}, and not whole with --compile.")
        net = net.to(memory_format=torch.channels_last).eval()
        self.net = in_bfloat16(net) if bf16 else net
        self.mode, self.window, self.bf16, self.ensemble = mode, window, bf16, ensemble
        self.device = next(net.parameters()).device
        self.gpu = self.device.type == "cuda"
        self.batch_pixels = GPU_PIXELS if self.gpu else 1  # at once; a CPU computes one window at a time
        self.threads = min(8, usable_cores()) if self.gpu else 1
        self.compiled = None
        if compile:
            self.compile()

    def compile(self):
        """Compiles the network for full batches of full windows. If that fails, it runs as it is."""
        net, mode = self.net, "reduce-overhead" if self.gpu else "default"
        self.compiled = torch.compile(lambda x: net(x)[0], dynamic=False, mode=mode)  # without the smaller images
        try:
            for _ in range(3):  # compiles, records a CUDA graph and replays it
                self.launch([(None, torch.zeros(3, self.window, self.window))])
            if self.gpu:
                torch.cuda.synchronize(self.device)
        except Exception as error:  # compilers fail in many ways
            self.compiled = None
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            logger.warning("note: the network runs uncompiled, as torch.compile failed: %s", reason)

    def is_full(self, windows):
        return windows.shape[-2:] == (self.window, self.window)

    def forward(self, x):
        return (self.compiled(x) if self.compiled and self.is_full(x) else self.net(x)[0]).float()

    def compute(self, x):
        """Windows B×3×h×w on the device -> their results, float32. If they exceed a GPU's memory, this and all later
        batches are halved."""
        try:
            return self.compute_at_once(x)
        except torch.OutOfMemoryError:
            if len(x) == 1:
                raise
        self.batch_pixels = x[: len(x) // 2, 0].numel()
        torch.cuda.empty_cache()
        return torch.cat([self.compute(half).clone() for half in x.chunk(2)])  # a CUDA graph overwrites its last result

    def compute_at_once(self, x):
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        comes_again = self.is_full(x) and len(x) == self.batch_size(*x.shape[2:])
        with torch.inference_mode(), strict_float32(benchmark=comes_again), autocast:
            return self_ensemble(self.forward, x) if self.ensemble else self.forward(x)

    def batch_size(self, height, width):
        return max(1, self.batch_pixels // (height * width))

    def spans(self, side):
        alone = side < self.window or self.mode == "whole"
        size = -(-side // MULTIPLE) * MULTIPLE if alone else self.window
        side = max(side, size)
        return tile_spans(side, size) if self.mode == "tile" else window_spans(side, size)

    def batches(self, pictures):
        """Iterable of (key, picture) -> lists of (canvas, window), windows of one size, also of several pictures."""
        batch = []
        for key, image in pictures:
            canvas = Canvas(key, image, *map(self.spans, image.shape[:2]))
            for window in canvas.windows():
                if batch and (window.shape != batch[0][1].shape or len(batch) >= self.batch_size(*window.shape[1:])):
                    yield batch
                    batch = []
                batch.append((canvas, window))
        if batch:
            yield batch

    def launch(self, batch):
        """Starts computing a batch and copying its results to the CPU -> (canvases, results, event that ends the copy).

        The copy is queued right behind the batch: when a later one runs, which may reuse the memory of this one's
        results, they have been copied."""
        canvases, windows = map(list, zip(*batch))
        if self.compiled and self.is_full(windows[0]):
            windows += windows[-1:] * (self.batch_size(self.window, self.window) - len(windows))
        x = torch.stack(windows)
        if self.gpu:
            x = x.pin_memory()
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with LOCK if self.gpu else contextlib.nullcontext():
            results = self.compute(x).to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.current_stream(self.device).record_event() if self.gpu else None
        return canvases, results, copied

    def stream(self, pictures, progress=None):
        """Iterable of (key, picture) -> yields (key, result) in order. A GPU computes a batch while the one before is
        collected. `progress` is called with the share of a picture that was just done."""
        for canvases, results, copied in ahead(map(self.launch, self.batches(pictures)), 1):
            if copied:
                copied.synchronize()
            for canvas, result in zip(canvases, results):
                canvas.add(result)
                if progress:
                    progress(1 / canvas.count)
                if canvas.added == canvas.count:
                    yield canvas.key, canvas.result

    def files(self, outputs, quality=QUALITY, progress=None):
        """Derains picture files, a dict of path: path of the result -> yields (path, UserError or None). Threads read
        ahead of the network and write behind it."""
        unreadable = []
        with ThreadPoolExecutor(self.threads) as pool:

            def read():
                for path, reading in ahead(((path, pool.submit(read_picture, path)) for path in outputs), self.threads):
                    if isinstance(reading.exception(), UserError):
                        unreadable.append((path, reading.exception()))
                        if progress:
                            progress(1)
                    else:
                        yield (path, reading.result()), reading.result().pixels

            def written():
                for (path, picture), pixels in self.stream(read(), progress):
                    result = picture._replace(pixels=pixels)
                    yield path, pool.submit(write_picture, outputs[path], result, quality)

            for path, writing in ahead(written(), self.threads):
                error = writing.exception()
                yield path, error if isinstance(error, UserError) else writing.result()
        yield from unreadable

    def __call__(self, image):
        """Derains one picture."""
        return next(self.stream([(None, image)]))[1]


def derain_files(derainer, outputs, quality=QUALITY, steady=False, progress=None):
    """Derains the pictures and clips of a dict of path: path of the result -> yields (path, UserError or None).

    `progress` is called with the share of a picture or frame that was just done, after each batch of windows."""
    from utils.video import derain_clip, is_clip  # loads FFmpeg, which programs that derain pictures do without

    yield from derainer.files({path: outputs[path] for path in outputs if not is_clip(path)}, quality, progress)
    for path in filter(is_clip, outputs):
        try:
            derain_clip(path, outputs[path], derainer, steady, progress)
        except UserError as error:
            yield path, error
        else:
            yield path, None


def results_settings(weights, derainer, input_folders):
    """-> dict of what results depend on, with the folders of their pictures: others may hold the same names."""
    settings = {name: getattr(derainer, name) for name in ("mode", "window", "bf16", "ensemble")}
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return {"weights": digest, "input_folders": sorted(map(os.path.realpath, input_folders)), **settings}


def remembered_settings(folder):
    """-> what remember_settings wrote there, or None."""
    try:
        return json.loads(Path(folder, SETTINGS).read_bytes().decode(errors="surrogateescape"))
    except (OSError, ValueError):
        return None


def remember_settings(folder, settings):
    """Writes results_settings to a folder of results, where these are new: earlier results are outdated then."""
    path, remembered = Path(folder, SETTINGS), remembered_settings(folder)
    if path.exists() and not (isinstance(remembered, dict) and "weights" in remembered):
        raise UserError(f"{path} is another program's: choose another folder for results.")
    if remembered != settings:
        write_json(path, settings)


def is_current(result, source, settings, folder):
    """Whether a result is newer than its source and was made with these settings, as `folder` remembers."""
    if not Path(result).is_file() or not Path(source).is_file() or remembered_settings(folder) != settings:
        return False
    newest = max(os.stat(path).st_mtime_ns for path in (source, Path(folder, SETTINGS)))
    return os.stat(result).st_mtime_ns >= newest


@functools.lru_cache(maxsize=1)
def load_derainer(weights, changed, gpus, options):
    """The Derainer of a checkpoint. `changed`, when the file was modified, is there for the cache: a newer file is
    loaded anew."""
    return Derainer(load_network(weights).to(choose_device(gpus)), **dict(options))


def derain(
    image: np.ndarray | Image.Image | str | os.PathLike,
    weights: str | os.PathLike = OWN_WEIGHTS,
    output: str | os.PathLike | None = None,
    gpus: str | int | None = None,
    **options,
) -> np.ndarray | Image.Image | Path:
    """Derains a picture and returns one of the same kind. For many files or clips use derain_files, for several
    networks Derainer itself.

    Args:
        image: an array H×W, H×W×1 to 4 (grey or RGB, the last of 2 or 4 is alpha, which stays as it is), uint8, uint16
            or floating-point in [0, 1]; a Pillow image; or the path of a picture file, whose result is written to
            `output` and whose path is returned
        weights: a checkpoint, by default this repository's own; it stays loaded for the next call
        output: the file that holds the result of a file, by default results/<its name>.png
        gpus: number of the GPU, or "cpu"; by default PyTorch's current GPU at the first call, if there is one
        options: mode, window, bf16, ensemble and compile, as Derainer takes them

    Raises UserError for a file that cannot be read or written, and ValueError for an array of another kind.
    """
    changed = os.stat(weights).st_mtime_ns if os.path.exists(weights) else None
    derainer = load_derainer(os.fspath(weights), changed, gpus, tuple(sorted(options.items())))
    if isinstance(image, str | os.PathLike):
        output = Path(output or f"results/{Path(image).stem}.png")
        if Path(image).resolve() == output.resolve():
            raise UserError(f"{image}: its result would overwrite it, choose another output.")
        picture = read_picture(image)
        pictures.write_picture(output, picture._replace(pixels=derainer(picture.pixels)))
        return output
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        result = Image.fromarray(derain_array(derainer, pictures.channels_of(upright)))
        if "icc_profile" in upright.info and upright.mode not in pictures.OTHER_COLOURS:
            result.info["icc_profile"] = upright.info["icc_profile"]
        return result
    return derain_array(derainer, image).reshape(image.shape)


def derain_array(derainer, pixels):
    """An array as `derain` takes it -> its result, H×W or H×W×2 to 4. Raises ValueError for one of another kind."""
    shape, dtype = (getattr(pixels, name, None) for name in ("shape", "dtype"))
    if not isinstance(pixels, np.ndarray) or not 2 <= len(shape) <= 3 or 0 in shape or max(shape[2:], default=1) > 4:
        raise ValueError(f"expected a path, a Pillow image or an array H×W(×1 to 4), not {type(pixels)}, {shape}")
    if np.issubdtype(dtype, np.floating):
        if not (pixels.min() >= -OVERSHOOT and pixels.max() <= 1 + OVERSHOOT):
            raise ValueError(f"expected values in [0, 1], not {pixels.min()} to {pixels.max()}: divide by 255")
    elif dtype not in (np.uint8, np.uint16):
        raise ValueError(f"expected values of type uint8, uint16 or floating-point in [0, 1], not {dtype}")
    picture = from_channels(np.atleast_3d(pixels))
    return to_channels(picture._replace(pixels=derainer(picture.pixels)))
