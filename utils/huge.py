"""Pictures too large to be held in memory: read, derained and written a band of rows at a time, with libvips."""

import contextlib
import logging
import math

import numpy as np
import tifffile

from utils.errors import UserError
from utils.files import atomic_path
from utils.formats import QUALITY, announced_pixels, in_png, to_grey

HUGE = 64 * 10**6  # pixels; smaller pictures take less than a gigabyte
KINDS = {"uchar": np.uint8, "ushort": np.uint16}
LOSSY = {"Q": QUALITY}
SAVERS = {  # ending -> function and options of libvips; Q and bigtiff are set for each file
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("jpegsave", LOSSY)),
    **dict.fromkeys(
        (".tif", ".tiff"), ("tiffsave", {"compression": "deflate", "predictor": "horizontal", "bigtiff": True})
    ),
    **{".png": ("pngsave", {}), ".webp": ("webpsave", LOSSY), ".avif": ("heifsave", LOSSY | {"compression": "av1"})},
}
LARGEST_SIDE = {"jpegsave": 65_500, "webpsave": 16_383, "heifsave": 16_384}  # of what a format holds, in pixels
METADATA = ("exif-", "icc-profile-data", "xmp-data", "iptc-data")  # beginnings of libvips' names
logger = logging.getLogger(__name__)


def is_huge(path):
    """Whether a file's header announces more than HUGE pixels."""
    return announced_pixels(path) > HUGE


class Bands:
    """The pixels of a libvips image as an array H×W×3 that can be sliced by rows, from top to bottom."""

    def __init__(self, image):
        self.region, self.shape = vips().Region.new(image), (image.height, image.width, 3)
        self.dtype = np.dtype(KINDS[image.format])
        self.start, self.rows = 0, np.empty((0, image.width, 3), self.dtype)  # those of the last band

    def __getitem__(self, wanted):
        end = self.start + len(self.rows)
        fetched = self.region.fetch(0, end, self.shape[1], wanted.stop - end)
        fetched = np.frombuffer(fetched, self.dtype).reshape(-1, *self.shape[1:])
        self.start, self.rows = wanted.start, np.concatenate([self.rows[wanted.start - self.start :], fetched])
        return self.rows


def vips():
    """The libvips binding, which is an extra. Raises UserError where it is missing."""
    try:
        import pyvips
    except ImportError:
        raise UserError(
            f"pictures of more than {HUGE // 10**6} megapixels are derained a band at a time with libvips: "
            "pip install -r requirements-extras.txt"
        ) from None
    pyvips.cache_set_max(0)  # or a file that was written anew is taken for the old one of its name
    return pyvips


def holds_ycbcr(path):
    """Whether a TIFF file holds YCbCr, and not as JPEG: libvips takes that for RGB."""
    with contextlib.suppress(Exception), tifffile.TiffFile(path) as file:  # of broken files, libvips says what is wrong
        page = file.pages[0]
        return page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression != tifffile.COMPRESSION.JPEG
    return False


def open_huge(path):
    """-> a libvips image, upright, of 1 to 4 channels of 8 or 16 bits."""
    kind = vips().Image.new_from_file(str(path)).get("vips-loader")
    if kind == "tiffload" and holds_ycbcr(path):
        raise UserError(f"{path} holds colours as YCbCr: save it as RGB.")
    # At less, damaged parts of a TIFF file are black. Warnings of JPEG decoders are about trifles.
    options = {"fail_on": "warning" if kind == "tiffload" else "error"}
    image = vips().Image.new_from_file(str(path), access="sequential", **options)
    if image.get_typeof("orientation") and image.get("orientation") > 1:
        image = vips().Image.new_from_file(str(path), **options).autorot()  # by way of the disk
    if image.interpretation == "cmyk":
        image = image.icc_transform("srgb") if image.get_typeof("icc-profile-data") else image.colourspace("srgb")
    if image.format not in KINDS or image.bands > 4:
        raise UserError(f"{path} has {image.bands} channels of type {image.format}: save it as RGB with 8 or 16 bits.")
    return image


def colours(image):
    """-> the same with three channels, alpha left away."""
    if image.hasalpha():
        image = image[: image.bands - 1]
    return image if image.bands == 3 else image[0].bandjoin([image[0], image[0]])


def holding(output, image):
    """-> a result's path, or where the format of its ending cannot hold the image, that of a PNG; the log says so."""
    save, _ = SAVERS.get(output.suffix.lower(), (None, None))
    too_deep = image.format == "ushort" and save not in ("pngsave", "tiffsave")
    too_large = max(image.width, image.height) > LARGEST_SIDE.get(save, math.inf)
    if save is None or too_deep or too_large or (save == "jpegsave" and image.hasalpha()):
        logger.warning("%s cannot hold the result: it is written as %s", output, in_png(output).name)
        return in_png(output)
    return output


@contextlib.contextmanager
def scratch(path):
    """Yields a file of that name, opened for writing, which vanishes in the end."""
    try:
        with open(path, "wb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def derain_huge(derainer, path, output, quality):
    """Derains a picture file into one of the output's ending; its colours, alpha and metadata are treated as in
    utils/formats.py -> the path that was written: a PNG where the ending's format cannot hold it. The result lies
    beside the output, uncompressed, until it is whole; the next call replaces what a killed one left. Raises
    UserError."""
    if derainer.mode == "whole":
        raise UserError(f"{path} is too large for --mode whole: leave that away.")
    try:
        original = open_huge(path)
        output = holding(output, original)
        bands = Bands(colours(original))
        (height, width, _), dtype, kind, grey = bands.shape, bands.dtype, original.format, original.bands < 3
        if min(height, width) < derainer.window:
            raise UserError(
                f"{path} is too narrow for windows of {derainer.window} pixels: choose a smaller --win_size."
            )
        with atomic_path(output) as result, scratch(result.with_suffix(".raw")) as raw:
            for _, rows in derainer.stream([(path, bands)]):
                raw.write((to_grey(rows) if grey else rows).tobytes())
            raw.flush()
            del bands, original  # with what libvips holds of the file
            channels, spaces = (1, ("b-w", "grey16")) if grey else (3, ("srgb", "rgb16"))
            image = vips().Image.rawload(raw.name, width, height, channels * dtype.itemsize, access="sequential")
            image = image.copy(bands=channels, format=kind, interpretation=spaces[dtype.itemsize - 1])
            again = open_huge(path)
            image = image.copy(xres=again.xres, yres=again.yres)
            if again.hasalpha():
                image = image.bandjoin(again[again.bands - 1])
            for name in again.get_fields():
                if name.startswith(METADATA):
                    image.set_type(again.get_typeof(name), name, again.get(name))
            image.set_type(vips().GValue.gint_type, "orientation", 1)  # the metadata hold the original's
            save, options = SAVERS[output.suffix.lower()]
            chosen = {"Q": quality, "bigtiff": height * width * 8 > 2**32}
            getattr(image, save)(str(result), **options | {name: chosen[name] for name in options if name in chosen})
        return output
    except vips().Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be derained a band at a time ({reason}): replace it, or save it as PNG, JPEG or TIFF."
        ) from error
