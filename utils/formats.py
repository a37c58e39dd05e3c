"""Picture files of all kinds, read and written so that a result has what its original had: bits, grey, transparency,
colour profile and metadata."""

import contextlib
import io
import itertools
import logging
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from utils.errors import UserError
from utils.files import atomic_write
from utils.sixteen_bits import UPRIGHT, read_16_bits, read_page, scaled_grey, white_of

KEEPABLE = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".avif"}  # endings we write
KEPT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"}  # Pillow's, whose colours are grey or RGB
XMP_TAG = 700  # of TIFF
QUALITY = 95  # of JPEG, WebP and AVIF
METADATA = ("icc_profile", "exif", "xmp", "dpi", "comment", "text")  # by Pillow's names; the last two: JPEG's and PNG's
XMP_TEXT = "XML:com.adobe.xmp"  # its name among a PNG file's texts
TIFF_TAGS = (  # of those in the file's first directory
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """A picture, upright."""

    pixels: np.ndarray  # H×W×3 RGB, uint8 or uint16
    grey: bool = False  # whether its file holds one channel; pixels has three equal ones
    alpha: np.ndarray | None = None  # H×W of the same type
    metadata: dict = {}  # noqa: RUF012 (never changed); of METADATA what there is


def exif_of(file):
    """-> EXIF data of an open picture, empty if they are damaged: no reason to refuse a picture."""
    try:
        return file.getexif()
    except Exception:  # parsers fail in many ways
        return Image.Exif()


def tiff_exif(exif):
    """What of a TIFF file's tags describes the picture and not the file -> bytes."""
    kept = Image.Exif()
    kept.update({tag: exif[tag] for tag in TIFF_TAGS if tag in exif})
    for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if exif.get_ifd(part):
            kept.get_ifd(part).update(exif.get_ifd(part))
    return kept.tobytes() if len(kept) else None


def png_texts(file):
    """The texts of an open PNG file but for those that hold other metadata -> dict of name -> str."""
    return {name: text for name, text in file.text.items() if name != XMP_TEXT and not name.startswith("Raw profile ")}


def grey_16_bits(picture):
    """Grey of more than 8 bits -> H×W uint16."""
    grey = np.asarray(picture)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("it has more than 16 bits; save it with 8 or 16 bits")
    return grey.astype(np.uint16)


def to_srgb(picture):
    """A CMYK picture -> RGB, by its colour profile if that works."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        return ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        return picture.convert("RGB")


def channels_of(image):
    """A Pillow image -> H×W×1 to 4 array, grey or RGB, without or with alpha: uint16 for deep grey, else uint8."""
    if image.mode.startswith("I"):
        return grey_16_bits(image)[..., None]
    kept = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        kept += "A"
    return np.atleast_3d(np.asarray((to_srgb(image) if image.mode == "CMYK" else image).convert(kept)))


def from_channels(pixels, metadata):
    """H×W×1 to 4 channels, grey or RGB, without or with alpha -> Picture."""
    colours, alpha = (pixels, None) if pixels.shape[2] % 2 else (pixels[..., :-1], pixels[..., -1].copy())
    grey = colours.shape[2] == 1
    colours = colours.repeat(3, axis=2) if grey else np.ascontiguousarray(colours)
    return Picture(colours, grey, alpha, {name: metadata[name] for name in METADATA if metadata.get(name)})


def read_rare_tiff(path):
    """A TIFF file of a kind that Pillow does not open, such as 16-bit grey with alpha -> Picture."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        tag, exif = page.tags.valueof, Image.Exif()
        exif.update({name: tag(name) for name in TIFF_TAGS if tag(name)})
        info = {"icc_profile": tag(ExifTags.Base.InterColorProfile), "exif": tiff_exif(exif), "xmp": tag(XMP_TAG)}
        return from_channels(read_page(page), info)


def announced_pixels(path):
    """-> how many pixels a picture file's header announces; infinity where Pillow refuses to open so many."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # what is wrong is said when the file is read
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is not ours
        try:
            with Image.open(path) as file:
                return file.width * file.height
        except Image.DecompressionBombError:
            return math.inf
        except UnidentifiedImageError:
            with tifffile.TiffFile(path) as file:
                return int(file.pages[0].imagewidth) * int(file.pages[0].imagelength)  # of damaged ones, anything
    return 0


def read_file(path):
    """read_picture, but with the errors of decoders."""
    try:
        file = Image.open(path)
    except UnidentifiedImageError:
        with contextlib.suppress(tifffile.TiffFileError, IndexError):  # it is no TIFF file either, or an empty one
            return read_rare_tiff(path)
        raise
    with file:
        if file.mode == "F":
            raise ValueError("it holds floating-point values; save it with 8 or 16 bits")
        white, frames = white_of(path, file), getattr(file, "n_frames", 1)
        reduced = np.any(white > 255) and not file.mode.startswith("I")  # by Pillow, to 8 bits
        deep = read_16_bits(path, file, white) if reduced else None
        if deep is None or file.format != "PPM":  # which Pillow decodes at 3 seconds a megapixel
            file.load()
        exif = exif_of(file)
        turned = exif.get(ExifTags.Base.Orientation, 1)
        picture = ImageOps.exif_transpose(file) if turned in UPRIGHT and turned > 1 else file
        info = dict(picture.info)
        if file.format == "TIFF":
            info["exif"] = tiff_exif(exif)
        if file.format == "PNG":
            info["text"] = png_texts(file)
    if frames > 1:
        logger.info("%s: only the first of its %d frames was read", path, frames)
    mode, transparency = picture.mode, picture.info.get("transparency")
    if mode.startswith("I"):
        deep = scaled_grey(channels_of(picture), file, white)
    elif deep is not None:
        deep = UPRIGHT.get(turned, UPRIGHT[1])(deep)
    if deep is not None:
        if transparency is not None:  # PNG's, a colour
            deep = np.dstack([deep, np.where((deep == transparency).all(axis=2), np.uint16(0), np.uint16(65535))])
        return from_channels(deep, info)
    pixels = channels_of(picture)
    if mode not in KEPT_MODES:
        info.pop("icc_profile", None)  # it describes other colours than RGB
    if reduced:
        logger.info("%s: only the upper 8 of its bits were kept", path)
    if mode not in ("1", "L", "LA", "RGB", "RGBA"):
        logger.info("%s: its mode %s was converted to RGB", path, mode)
    return from_channels(pixels, info)


def read_picture(path):
    """Reads any picture. Grey stays grey, 16 bits stay 16, alpha and metadata come along; palettes, CMYK and other
    colours become RGB, of several frames the first is taken, where 16 bits cannot be read the upper 8 are, and the log
    says so.

    Raises UserError for a file that is missing, broken or not a picture.
    """
    try:
        return read_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{path} is too large to be read at once, or a decompression bomb: test.py derains large pictures a band "
            "at a time."
        ) from None
    except Exception as error:  # decoders fail in many ways on hostile files
        raise UserError(f"{path} cannot be read as a picture ({error}): replace or remove it.") from error


def to_grey(pixels):
    """H×W×3 -> H×W, the mean of what the network made of three equal channels."""
    mean = pixels.mean(axis=2)
    return (mean.round() if np.issubdtype(pixels.dtype, np.integer) else mean).astype(pixels.dtype)


def to_channels(picture):
    """Picture -> H×W grey, or H×W×2 to 4 with grey or RGB, without or with alpha."""
    pixels = to_grey(picture.pixels) if picture.grey else picture.pixels
    return pixels if picture.alpha is None else np.dstack([pixels, picture.alpha])


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def text_chunks(metadata):
    """What a PNG file holds as texts -> PngInfo."""
    chunks = PngInfo()
    for name, text in metadata.get("text", {}).items():
        chunks.add_text(name, text)
    if "xmp" in metadata:
        chunks.add_itxt(XMP_TEXT, metadata["xmp"].decode())
    return chunks


def tiff_16_bits(pixels, metadata):
    """H×W(×3 or 4) uint16 -> bytes; of EXIF no more than TIFF_TAGS, as tifffile writes no further directories."""
    options = {"photometric": "minisblack" if pixels.ndim == 2 else "rgb", "compression": "zlib", "predictor": True}
    if pixels.shape[2:] == (4,):
        options["extrasamples"] = ["unassalpha"]
    if "dpi" in metadata:
        options |= {"resolution": tuple(map(float, metadata["dpi"])), "resolutionunit": "INCH"}
    exif = Image.Exif()
    exif.load(metadata.get("exif", b""))
    texts = {tag: str(exif[tag]).encode("latin-1") for tag in TIFF_TAGS if tag in exif}
    options["software"] = texts.pop(ExifTags.Base.Software, False)
    options["extratags"] = [(tag, "s", 0, text, True) for tag, text in texts.items()]
    if "xmp" in metadata:
        options["extratags"].append((XMP_TAG, "B", len(metadata["xmp"]), metadata["xmp"], True))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, iccprofile=metadata.get("icc_profile"), metadata=None, **options)
    return buffer.getvalue()


def png_16_bits(pixels, metadata):
    """H×W(×3 or 4) uint16 -> bytes."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    encoded, chunks = cv2.imencode(".png", pixels)[1].tobytes(), b""
    if "icc_profile" in metadata:
        chunks += png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata["icc_profile"]))
    if "exif" in metadata:
        chunks += png_chunk(b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0"))
    if "dpi" in metadata:
        chunks += png_chunk(b"pHYs", struct.pack(">IIB", *(round(float(dpi) / 0.0254) for dpi in metadata["dpi"]), 1))
    for name, content, *_ in text_chunks(metadata).chunks:
        chunks += png_chunk(name, content)
    header = 8 + 25  # the signature and the first chunk, which has 13 bytes of content
    return encoded[:header] + chunks + encoded[header:]


WRITERS_16_BITS = {"PNG": png_16_bits, "TIFF": tiff_16_bits}  # what holds 16 bits


def encode(pixels, ending, quality, metadata):
    """H×W(×2, 3 or 4) uint8 or uint16 -> bytes of a picture file."""
    if ending not in KEEPABLE:
        raise ValueError(f"no {ending or 'files without an ending'} are written")
    kind = Image.registered_extensions()[ending]
    if pixels.dtype == np.uint16:  # which Pillow does not write in colour
        if kind not in WRITERS_16_BITS:
            raise ValueError(f"{kind} has no 16 bits")
        return WRITERS_16_BITS[kind](pixels, metadata)
    if kind == "BMP" and pixels.shape[2:] in ((2,), (4,)):
        raise ValueError("most programs ignore alpha in BMP")  # and Pillow would write it
    options, buffer = {name: metadata[name] for name in metadata if name != "text"}, io.BytesIO()
    if kind == "PNG":
        options["pnginfo"] = text_chunks(metadata)
    if kind in ("JPEG", "WEBP", "AVIF"):
        options["quality"] = quality
    if kind in ("JPEG", "AVIF"):
        options["subsampling"] = "4:4:4"
    if kind == "TIFF":
        options["compression"] = "tiff_lzw"
        if "xmp" in options:
            exif = Image.Exif()
            exif.load(options.get("exif", b""))
            exif[XMP_TAG] = options.pop("xmp")
            options["exif"] = exif
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def in_png(path):
    """-> the name of a result that the format of the path's ending cannot hold."""
    return path.with_name(f"{path.name}.png")


def write_picture(path, picture, quality=QUALITY):
    """Writes a Picture in the format of the path's ending, one of KEEPABLE. What that cannot hold becomes a PNG file of
    that name with .png behind it, and the log says so. A file is replaced only once the new one is complete.

    -> the path of what was written.
    """
    path, pixels = Path(path), to_channels(picture)
    if pixels.shape[2:] == (2,) and pixels.dtype == np.uint16:  # no writer knows that kind
        pixels = pixels[..., [0, 0, 0, 1]]
    colours = {name: content for name, content in picture.metadata.items() if name == "icc_profile"}
    for target, metadata in itertools.product((path, in_png(path)), (picture.metadata, colours, {})):
        try:
            content = encode(pixels, target.suffix.lower(), quality, metadata)
            break
        except Exception as error:  # damaged metadata make writers fail in many ways
            reason = error
    else:
        raise UserError(f"{path} cannot be written ({reason}).") from reason
    if target != path:
        logger.warning("%s cannot hold the result (%s): it is written as %s", path, reason, target.name)
    if metadata != picture.metadata:
        kept = " but for the colour profile" if metadata else ""
        logger.warning("%s: the original's metadata were left away%s (%s)", path, kept, reason)
    with atomic_write(target) as file:
        file.write(content)
    return target
