"""Pictures of more than 8 bits a sample that Pillow reduces to 8, misreads or does not open: by OpenCV and tifffile, as
H×W×channels uint16. Those are grey or RGB; where their number is even, the last is alpha."""

import math
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image

COLOURS = {tifffile.PHOTOMETRIC.MINISBLACK: 1, tifffile.PHOTOMETRIC.RGB: 3}  # kinds of TIFF -> channels
WHITE_IS_ZERO = 0  # TIFF's number for grey that ends at black
APART = 2  # TIFF's number for channels that are stored one after the other
PREMULTIPLIED, ALPHA = 1, 2  # and for what a further channel is
UPRIGHT = {  # EXIF orientation -> how to turn the pixels
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}


def white_of(path, file):
    """-> what stands for white in a picture that is open in Pillow and not yet loaded: more than 255 where samples have
    more than 8 bits, an array where channels differ."""
    codec, *_, layout = file.tile[0] if file.tile else ("", "")
    if codec in ("ppm", "ppm_plain"):
        return layout[-1]
    if file.format == "JPEG2000":
        content = Path(path).read_bytes()
        start = content.index(b"\xff\x4f\xff\x51") + 42  # where its codestream describes the first channel
        return 2.0 ** (np.frombuffer(content, np.uint8, 3 * content[start - 1], start)[::3] % 128 + 1) - 1
    if file.format == "TIFF":
        return 2 ** max(file.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))) - 1
    return 65535 if ";16" in str(layout) else 255


def scaled(pixels, factor):
    return np.minimum(pixels * factor, 65535).round().astype(np.uint16)


def scaled_grey(pixels, file, white):
    """Grey of more than 8 bits as Pillow reads it -> with 65535 for white. In TIFF files of 12 bits, and in those where
    0 is white, Pillow leaves the values as they are."""
    if file.format != "TIFF" or white > 65535:
        return pixels
    pixels = scaled(pixels, 65535 / white)
    return 65535 - pixels if file.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO else pixels


def straight(pixels):
    """Undoes that colours were multiplied by alpha."""
    alpha = pixels[..., -1:]
    return np.dstack([scaled(pixels[..., :-1], np.float32(65535) / np.maximum(alpha, 1)), alpha])


def read_page(page):
    """-> pixels of a page of tifffile's, upright. Raises ValueError for what is not 16-bit RGB or grey of several
    channels, and what tifffile raises for compressions that it lacks."""
    channels = COLOURS.get(page.photometric)
    if not channels or page.dtype != np.uint16 or page.axes not in ("YXS", "SYX"):
        raise ValueError("it is of a rare kind; save it as RGB with 8 or 16 bits")
    if math.prod(page.shape) > 4 * Image.MAX_IMAGE_PIXELS:
        raise ValueError("it is too large for its kind; save it as RGB, with its channels together")
    pixels = page.asarray() if page.axes == "YXS" else np.moveaxis(page.asarray(), 0, 2)
    extra = page.extrasamples[0] if page.extrasamples else None
    pixels = pixels[..., : channels + (extra in (PREMULTIPLIED, ALPHA))]
    pixels = straight(pixels) if extra == PREMULTIPLIED else pixels
    return UPRIGHT.get(page.tags.valueof(ExifTags.Base.Orientation), UPRIGHT[1])(pixels)


def read_16_bits(path, file, white):
    """-> pixels of a picture in colour, or in grey with alpha, that is open in Pillow and not yet loaded; None if no
    library keeps more than 8 bits of it. Those of TIFF are upright, as Pillow's are, those of other files as stored."""
    tags = file.tag_v2 if file.format == "TIFF" else {}
    if tags.get(ExifTags.Base.PlanarConfiguration) == APART:  # OpenCV mixes them up
        try:
            with tifffile.TiffFile(path) as tiff:
                return read_page(tiff.pages[0])
        except Exception:  # tifffile lacks some compressions, and says so in many ways
            if file.tile[0][0] == "raw":  # not compressed, and taken for 8 bits by Pillow
                raise
            return None
    if file.mode not in ("RGB", "RGBA"):  # such as CMYK, which OpenCV would take for RGBA
        return None
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[2:] not in ((3,), (4,)):
        return None
    pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    if np.any(white != 65535):
        pixels = scaled(pixels, np.divide(65535, white, dtype=np.float32))
    grey = "LA;16" in str(file.tile[0][3])  # PNG's grey with alpha, which Pillow and OpenCV make RGBA
    pixels = pixels[..., ::3] if grey else pixels[..., : len(file.mode)]
    return straight(pixels) if tags.get(ExifTags.Base.ExtraSamples) == (PREMULTIPLIED,) else pixels
