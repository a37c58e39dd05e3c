"""Picture files in and out. A result keeps what its original has: grey, alpha, 16 bits, colour profile, EXIF.

Pillow reads and writes all but colours of 16 bits, for which there are OpenCV and tifffile.
"""

import glob
import io
import itertools
import logging
import os
import struct
import zlib
from os.path import join, realpath
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from utils.files import UserError, atomic_write, counted

ENDINGS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".tga", ".jp2"),
}
CLIP_ENDINGS = {".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".ts"}
NOT_SKIPPED = {"thumbs.db", "desktop.ini", "psnr_ssim.csv", "settings.json"}  # files that nobody misses
FORMATS = {  # that are written: ending -> Pillow's name
    ending: name
    for ending, name in Image.registered_extensions().items()
    if ending in ENDINGS and name in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "AVIF")
}
KEEPABLE = set(FORMATS)
QUALITY = 95  # of JPEG, WebP and AVIF
MOST_PIXELS = 250 * 10**6
Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow warns above it and refuses twice as many
OTHER_COLOURS = {"CMYK", "LAB", "YCbCr", "HSV"}  # Pillow's modes that become RGB and whose profiles are void then
TIFF_TAGS = {  # those of a TIFF file's first directory that describe the picture and not the file
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo),
}
logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """A picture, upright."""

    pixels: np.ndarray  # H×W×3 RGB, uint8 or uint16
    grey: bool = False  # whether the file holds one channel, of which `pixels` has three copies
    alpha: np.ndarray | None = None  # H×W, of the same type
    metadata: dict = {}  # noqa: RUF012 (never changed); "icc_profile" and "exif", bytes, where the file has them


def is_picture(path):
    """Whether a path is named like a picture and is a file, or a link that leads nowhere: reading it will say so."""
    named = path.suffix.lower() in ENDINGS and not path.name.startswith(".")
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))


def walk(root):
    """-> lists of the files in a folder tree, of its linked folders, which are not followed, and of the folders that
    cannot be read. Hidden folders are left out."""
    files, links, errors = [], [], []
    for folder, folders, names in os.walk(root, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [Path(folder, name) for name in folders if os.path.islink(join(folder, name))]
        files += [Path(folder, name) for name in names]
    if errors and Path(errors[0].filename) == Path(root):
        raise errors[0]
    return files, links, [Path(error.filename) for error in errors]


def originals(paths, root, results):
    """-> the paths without those in the folders `results`, as far as these lie below `root`."""
    root = join(realpath(root), "")
    results = (join(realpath(folder), "") for folder in results)
    results = tuple(folder for folder in results if folder.startswith(root) and folder != root)
    if not results:
        return paths
    return [path for path in paths if not join(realpath(path.parent), "").startswith(results)]


def find_pictures(source, results=()):
    """Finds the pictures of a file, a folder tree or a glob pattern.

    Args:
        source: path or pattern.
        results: folders that earlier runs wrote; what lies in them is left out.

    Returns:
        (sorted paths, the folder that they are relative to). Folders that cannot be read are among the paths: reading
        them will say so.

    Raises:
        UserError: if there are no pictures.
    """
    path, source = Path(source), str(source)
    if not source:
        raise UserError('an empty name stands for no picture: give a picture or a folder, "." for this one.')
    if path.is_dir():
        files, _, unreadable = walk(path)
        root, found = path, [*filter(is_picture, files), *unreadable]
    elif path.is_file():
        root, found = path.parent, [path]
    elif glob.has_magic(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [path for path in map(Path, glob.glob(source, recursive=True)) if is_picture(path)]
    else:
        raise UserError(f"{source} does not exist: give a picture, a folder or a quoted pattern, 'photos/*.jpg'.")
    if not found:
        raise UserError(
            f"{source} holds no pictures: the endings looked for are {' '.join(sorted(ENDINGS))}. Clips are given by "
            "name or quoted pattern, such as 'holiday/*.mp4'."
        )
    found = originals(found, root, results)
    if not found:
        raise UserError(f"{source} holds only results of earlier runs: give the pictures that they were made from.")
    return sorted(found), root


def skipped(source, results=()):
    """-> what find_pictures leaves out of a folder, such as "skipped: 1 clip, 2 files of unknown kind", or ""."""
    if not os.path.isdir(source):
        return ""
    files, links, _ = walk(source)
    others = [path for path in originals(files, source, results) if not is_picture(path)]
    others = [path for path in others if not path.name.startswith(".") and path.name.lower() not in NOT_SKIPPED]
    clips = sum(path.suffix.lower() in CLIP_ENDINGS for path in others)
    unknown, links = len(others) - clips, len(originals(links, source, results))
    parts = [(clips, "clip", ""), (unknown, "file", " of unknown kind"), (links, "linked folder", "")]
    parts = [counted(number, noun) + rest for number, noun, rest in parts if number]
    return f"skipped: {', '.join(parts)}" if parts else ""


def upright(pixels, orientation):
    """Turns pixels stored in an EXIF orientation of 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def channels_of(image):
    """A Pillow image -> H×W×1 to 4, grey or RGB, without or with alpha: uint16 for grey of 16 bits, else uint8."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image)[..., None]
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("it has more than 16 bits; save it with 8 or 16 bits")
        return grey.astype(np.uint16)
    if image.mode == "CMYK":
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (KeyError, OSError, ImageCms.PyCMSError):  # no profile, or a damaged one
            image = image.convert("RGB")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        mode += "A"
    return np.atleast_3d(np.asarray(image if image.mode == mode else image.convert(mode)))


def from_channels(pixels, metadata={}):  # noqa: B006 (never changed)
    """H×W×1 to 4, grey or RGB, without or with alpha -> Picture."""
    colours, alpha = (pixels, None) if pixels.shape[2] % 2 else (pixels[..., :-1], pixels[..., -1].copy())
    grey = colours.shape[2] == 1
    colours = colours.repeat(3, axis=2) if grey else np.ascontiguousarray(colours)
    return Picture(colours, grey, alpha, metadata)


def to_channels(picture):
    """Picture -> H×W grey, the mean of the three channels, or H×W×2 to 4, grey or RGB, without or with alpha."""
    pixels = picture.pixels
    if picture.grey:
        pixels = pixels.mean(axis=2).round().astype(pixels.dtype)
    return pixels if picture.alpha is None else np.dstack([pixels, picture.alpha])


def has_deep_colours(file):
    """Whether Pillow, in which the file is open and not yet loaded, would reduce its colours from 16 to 8 bits. It does
    so with AVIF and JPEG 2000, too, which count as 8 bits here."""
    if file.mode[0] in "FI":  # floating point, and grey
        return False
    layout = file.tile[0][3] if file.tile else ""
    if file.format == "PNG":
        return ";16" in str(layout)
    if file.format == "PPM":
        return layout[-1] == 65535
    return max(tiff_tag(file, "BitsPerSample", (8,))) == 16


def tiff_tag(file, name, default=None):
    """-> a tag of a picture that is open in Pillow, where it is TIFF."""
    return file.tag_v2.get(ExifTags.Base[name], default) if file.format == "TIFF" else default


def read_deep_tiff(path):
    """Reads what Pillow and OpenCV misread: 16-bit TIFF of separate planes, or of grey with alpha -> Picture."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        if page.imagewidth * page.imagelength > MOST_PIXELS:
            raise Image.DecompressionBombError
        channels = {tifffile.PHOTOMETRIC.MINISBLACK: 1, tifffile.PHOTOMETRIC.RGB: 3}.get(page.photometric)
        extra = page.extrasamples[:1]
        if not channels or page.dtype != np.uint16 or page.axes not in ("YXS", "SYX") or extra == (1,):
            raise ValueError("it is TIFF of a rare kind; save it as RGB with 8 or 16 bits")
        pixels = page.asarray() if page.axes == "YXS" else np.moveaxis(page.asarray(), 0, 2)
        pixels = upright(pixels, page.tags.valueof(ExifTags.Base.Orientation))
        profile = page.tags.valueof(ExifTags.Base.InterColorProfile)
    metadata = {"icc_profile": profile} if profile else {}
    return from_channels(pixels[..., : channels + (extra == (2,))], metadata)


def read_deep_colours(path, file):
    """Reads colours, or grey with alpha, of 16 bits; the file is open in Pillow, too -> H×W×2 to 4 uint16."""
    if file.mode not in ("RGB", "RGBA", "LA"):
        raise ValueError(f"it has 16 bits in mode {file.mode}; save it as RGB")
    if "transparency" in file.info or tiff_tag(file, "ExtraSamples") == (1,):
        raise ValueError("its transparency is a single colour, or premultiplied; save it with a plain alpha channel")
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise ValueError("it is damaged or of a rare kind; save it as RGB with 8 or 16 bits")
    pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    if "LA;16" in str(file.tile[0][3]):  # PNG, of which OpenCV makes RGBA
        return pixels[..., ::3]
    return pixels[..., : len(file.mode)]  # without extra channels other than alpha


def exif_of(file):
    """-> EXIF orientation of a loaded picture, and bytes of its other EXIF data; they may be damaged, or none."""
    try:
        exif = file.getexif()
        orientation = exif.pop(ExifTags.Base.Orientation, 1)
        for tag in set(exif) - TIFF_TAGS if file.format == "TIFF" else ():
            del exif[tag]
        return orientation, exif.tobytes() if len(exif) else b""
    except Exception as error:  # parsers fail in many ways on damaged data
        logger.info("%s: its EXIF data are damaged (%s)", file.filename, error)
        return 1, b""


def read_open(path, file):
    """A file that is open in Pillow -> Picture."""
    if file.width * file.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    if getattr(file, "n_frames", 1) > 1:
        logger.info("%s: only the first of its %d frames was read", path, file.n_frames)
    mode, deep, bits = file.mode, has_deep_colours(file), max(tiff_tag(file, "BitsPerSample", (8,)))
    if 8 < bits != 16 and mode != "F":
        raise ValueError(f"it has {bits} bits a sample; save it with 8 or 16 bits")
    if deep and tiff_tag(file, "PlanarConfiguration") == 2:
        return read_deep_tiff(path)
    pixels = read_deep_colours(path, file) if deep else None
    if not (deep and file.format == "PPM"):  # for a megapixel of which Pillow takes 3 seconds
        file.load()  # also finds metadata at the file's end
    if not deep:
        pixels = channels_of(file)
    if mode[0] == "I" and tiff_tag(file, "PhotometricInterpretation") == 0:  # white is 0, which Pillow ignores
        pixels = 65535 - pixels
    if mode in OTHER_COLOURS | {"P", "PA"}:
        logger.info("%s: mode %s was converted to %s", path, mode, "RGBA" if pixels.shape[2] == 4 else "RGB")
    orientation, exif = exif_of(file)
    metadata = {"exif": exif} if exif else {}
    if file.info.get("icc_profile") and mode not in OTHER_COLOURS:
        metadata["icc_profile"] = file.info["icc_profile"]
    return from_channels(upright(pixels, orientation), metadata)


def read_picture(path):
    """Reads a picture file: grey stays grey, 16 bits stay 16; palettes, CMYK and other colours become RGB; of several
    frames the first is taken.

    Returns:
        Picture.

    Raises:
        UserError: for a file that is missing, damaged, too large or of a kind that is not read.
    """
    try:
        try:
            with Image.open(path) as file:
                return read_open(path, file)
        except UnidentifiedImageError:
            return read_deep_tiff(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Image.DecompressionBombError:
        most = MOST_PIXELS // 10**6
        raise UserError(f"{path} has more than {most} megapixels: reduce it, or cut it into parts.") from None
    except tifffile.TiffFileError:
        reason = "it is damaged or of a kind that is not read, as HEIC, JPEG XL and camera raw are"
        raise UserError(f"{path} cannot be read as a picture ({reason}): convert, replace or remove it.") from None
    except Exception as error:  # decoders fail in many ways on damaged files
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a picture ({reason}): replace or remove it.") from error


def png_16_bits(pixels, metadata):
    """H×W(×3 or 4) uint16 -> bytes of a PNG file."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    encoded, chunks = cv2.imencode(".png", pixels)[1].tobytes(), b""
    contents = {}
    if "icc_profile" in metadata:
        contents[b"iCCP"] = b"ICC profile\0\0" + zlib.compress(metadata["icc_profile"])
    if "exif" in metadata:
        contents[b"eXIf"] = metadata["exif"].removeprefix(b"Exif\0\0")
    for name, content in contents.items():
        chunks += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    start = 8 + 25  # behind the signature and the header
    return encoded[:start] + chunks + encoded[start:]


def tiff_16_bits(pixels, metadata):
    """H×W(×3 or 4) uint16 -> bytes of a TIFF file. Of EXIF, tifffile writes the texts of the first directory only."""
    exif = Image.Exif()
    exif.load(metadata.get("exif", b""))
    texts = {tag: exif[tag].encode("latin-1") for tag in TIFF_TAGS & set(exif) if isinstance(exif[tag], str)}
    tags = [(tag, "s", 0, text, True) for tag, text in texts.items()]
    if "icc_profile" in metadata:
        profile = metadata["icc_profile"]
        tags.append((ExifTags.Base.InterColorProfile, "B", len(profile), profile, True))
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        pixels,
        photometric="minisblack" if pixels.ndim == 2 else "rgb",
        extrasamples=["unassalpha"] if pixels.shape[2:] == (4,) else None,
        compression="zlib",
        predictor=True,
        extratags=tags,
        metadata=None,
        software=False,
    )
    return buffer.getvalue()


def encode(pixels, kind, quality, metadata):
    """H×W(×2, 3 or 4) uint8 or uint16 -> bytes of a file of a kind that Pillow names so."""
    if pixels.dtype == np.uint16:
        return {"PNG": png_16_bits, "TIFF": tiff_16_bits}[kind](pixels, metadata)
    options, buffer = dict(metadata), io.BytesIO()
    if kind in ("JPEG", "WEBP", "AVIF"):
        options["quality"] = quality
    if kind in ("JPEG", "AVIF"):
        options["subsampling"] = "4:4:4"
    if kind == "TIFF":
        options["compression"] = None if "exif" in metadata else "tiff_lzw"  # with which Pillow fails on EXIF
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_picture(path, picture, quality=QUALITY):
    """Writes a picture in the format of the path's ending, whole or not at all.

    Args:
        path: of an ending in KEEPABLE.
        picture: Picture.
        quality: 1 to 100, of JPEG, WebP and AVIF.

    Raises:
        UserError: if the format cannot hold the picture, or the file cannot be written.
    """
    path, pixels = Path(path), to_channels(picture)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} cannot be written: choose one of the endings {' '.join(sorted(KEEPABLE))}.")
    if pixels.dtype == np.uint16 and kind not in ("PNG", "TIFF"):
        raise UserError(f"{path} cannot be written, as {kind} holds no 16 bits: choose .png.")
    if picture.alpha is not None and kind in ("JPEG", "BMP"):
        raise UserError(f"{path} cannot be written, as {kind} holds no alpha: choose .png.")
    if pixels.shape[2:] == (2,) and pixels.dtype == np.uint16:  # no writer knows grey with alpha of 16 bits
        pixels = pixels[..., [0, 0, 0, 1]]
    try:
        content = encode(pixels, kind, quality, picture.metadata)
    except Exception as reason:  # writers fail in many ways on damaged metadata
        try:
            content = encode(pixels, kind, quality, {})
        except Exception as error:
            raise UserError(f"{path} cannot be written ({error}): choose .png.") from error
        logger.warning("%s: written without colour profile and EXIF (%s)", path, reason)
    with atomic_write(path) as file:
        file.write(content)


def read_image(path):
    """-> H×W×3 uint8, of 16 bits the upper 8. Raises UserError as read_picture does."""
    return eight_bits(read_picture(path).pixels)


def write_png(path, image):
    """Writes H×W×3 uint8 or uint16 as PNG, whole or not at all."""
    write_picture(path, Picture(image))


def eight_bits(pixels):
    """uint8 or uint16 -> uint8."""
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def peak_value(dtype):
    """-> what stands for 1: 255 of uint8, 65535 of uint16, 1 of floating point."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1


def reflect_pad(image, height, width):
    """Pads H×W×C at the bottom and right by reflection to at least height × width, repeatedly if need be."""
    missing = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")


def contact_sheet(rows, border=8):
    """Puts rows of pictures, H×W×3 uint8 of any sizes, on a white one; a row has the height of its first picture."""

    def white_after(image, below, right):
        return np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=255)

    strips = []
    for row in rows:
        height = row[0].shape[0]
        scaled = [cv2.resize(image, (round(image.shape[1] * height / image.shape[0]), height)) for image in row]
        strips.append(np.hstack([white_after(image, border, border) for image in scaled]))
    width = max(strip.shape[1] for strip in strips)
    sheet = np.vstack([white_after(strip, 0, width - strip.shape[1]) for strip in strips])
    return np.pad(sheet, ((border, 0), (border, 0), (0, 0)), constant_values=255)
