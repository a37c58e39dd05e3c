"""Picture files in and out. A result keeps what its original has: grey, alpha, 16 bits, colour profile, EXIF.

Pillow reads and writes all but 16 bits, of which it reads grey; OpenCV reads colours, OpenCV and tifffile write both.
"""

import glob
import io
import itertools
import logging
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from utils.files import UserError, atomic_write, counted

ENDINGS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".tga", ".jp2"),
}
FORMATS = {ending: name for ending, name in Image.registered_extensions().items() if ending in ENDINGS}  # Pillow's
KEEPABLE = {ending for ending, name in FORMATS.items() if name not in ("GIF", "PPM", "TGA", "JPEG2000")}
CLIP_ENDINGS = {".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".ts"}
BYPRODUCTS = {"thumbs.db", "desktop.ini", "psnr_ssim.csv", "settings.json"}  # not mentioned when they are skipped
QUALITY = 95  # of JPEG, WebP and AVIF
MOST_PIXELS = 250 * 10**6
Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow warns above it and refuses twice as many
OTHER_COLOURS = {"CMYK", "LAB", "YCbCr", "HSV"}  # modes that become RGB, for which their profiles do not hold
TIFF_TAGS = {  # those that describe the picture and not the file
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo),
}
UNREADABLE = "it is damaged, or of an unsupported kind, such as HEIC, JPEG XL, camera raw or floating point"
WRITE_PNG = "write PNG, as test.py does without --keep_format."
logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """A picture, upright."""

    pixels: np.ndarray  # H×W×3 RGB, uint8 or uint16
    grey: bool = False  # whether the file holds one channel, of which `pixels` has three copies
    alpha: np.ndarray | None = None  # H×W, of the same type
    metadata: dict = {}  # noqa: RUF012 (never changed); "icc_profile" and "exif", bytes, where the file has them


def is_picture(path):
    """Whether a path is named like a picture and is a file, or a link: reading says so if it leads nowhere."""
    return path.suffix.lower() in ENDINGS and not path.is_dir() and (path.is_file() or path.is_symlink())


def walk(root):
    """-> the files of a folder tree, and its linked folders, which are not followed; both without hidden ones."""

    def fail(error):
        raise error

    files, links = [], []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return files, links


def without_results(paths, root, results):
    """-> the paths that are not in one of the folders `results`, as far as these are below `root`."""
    results = [Path(folder).resolve() for folder in results]
    results = [folder for folder in results if Path(root).resolve() in folder.parents]
    return [path for path in paths if not any(map(path.parent.resolve().is_relative_to, results))] if results else paths


def root_of(pattern):
    """-> the folder that a glob pattern searches."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))


def find_pictures(source, results=()):
    """Finds the pictures of a file, a folder tree or a glob pattern.

    Args:
        source: path or pattern.
        results: folders that earlier runs wrote; pictures in them are left out.

    Returns:
        (sorted paths, the folder that they are relative to).

    Raises:
        UserError: if there are no pictures.
    """
    path, source = Path(source), str(source)
    if source and path.is_dir():
        root, found = path, [file for file in walk(path)[0] if is_picture(file)]
    elif path.is_file():
        root, found = path.parent, [path]
    elif glob.has_magic(source):
        root = root_of(source)
        found = [file for file in map(Path, glob.glob(source, recursive=True)) if is_picture(file)]
    else:
        name = source or "a picture without a name"
        raise UserError(f"{name} does not exist: give a picture, a folder or a quoted pattern, 'photos/*.jpg'.")
    if not found:
        raise UserError(
            f"{source} holds no pictures: the endings looked for are {' '.join(sorted(ENDINGS))}. Clips are given by "
            "name or quoted pattern, such as 'holiday/*.mp4'."
        )
    found = without_results(found, root, results)
    if not found:
        raise UserError(f"{source} holds only results of earlier runs: give the pictures that they were made from.")
    return sorted(found), root


def skipped(source, results=()):
    """-> what find_pictures leaves out of a folder or pattern, such as "skipped: 1 clip, 2 files of unknown kind", or
    "". Clips that match a pattern are not left out: test.py derains them."""
    files, links, root = [], [], source
    if os.path.isdir(source):
        files, links = walk(source)
    elif not os.path.exists(source):
        root = root_of(source)
        matching = map(Path, glob.glob(str(source), recursive=True))
        files = [path for path in matching if path.is_file() and path.suffix.lower() not in CLIP_ENDINGS]
    others = [path for path in without_results(files, root, results) if not is_picture(path)]
    clips = sum(path.suffix.lower() in CLIP_ENDINGS for path in others)
    unknown = len(others) - clips - sum(path.name.lower() in BYPRODUCTS for path in others)
    links = len(without_results(links, root, results))
    parts = [
        counted(clips, "clip") if clips else "",
        f"{counted(unknown, 'file')} of unknown kind" if unknown else "",
        counted(links, "linked folder") if links else "",
    ]
    return f"skipped: {', '.join(filter(None, parts))}" if any(parts) else ""


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
    if image.mode[0] in "FI":
        grey = np.asarray(image)[..., None]
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(UNREADABLE)
        return grey.astype(np.uint16)
    if image.mode == "CMYK":
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (KeyError, OSError, ImageCms.PyCMSError):  # no profile, or a damaged one
            image = image.convert("RGB")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
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
    pixels, dtype = picture.pixels, picture.pixels.dtype
    if picture.grey:
        pixels = pixels.mean(axis=2)
        pixels = (pixels.round() if np.issubdtype(dtype, np.integer) else pixels).astype(dtype)
    return pixels if picture.alpha is None else np.dstack([pixels, picture.alpha])


def is_rare_tiff(file):
    """Whether a TIFF file that is open in Pillow is of a kind that Pillow and OpenCV are known to misread: more than 8
    bits, but not 16; or 16 with separate planes, premultiplied alpha, or white as 0."""
    tags, names = file.tag_v2, ExifTags.Base
    bits = max(tags.get(names.BitsPerSample, (1,)))
    plain = tags.get(names.PlanarConfiguration, 1) == 1 and tags.get(names.PhotometricInterpretation) in (1, 2)
    return bits > 8 and not (bits == 16 and plain and tags.get(names.ExtraSamples) != (1,))


def read_16_bits(path, file):
    """Reads PNG or TIFF, open in Pillow, too, whose colours have 16 bits -> H×W×3 or 4 uint16."""
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if file.mode not in ("RGB", "RGBA") or "transparency" in file.info or pixels is None or pixels.dtype != np.uint16:
        raise ValueError(UNREADABLE)
    return pixels.take([2, 1, 0, 3][: len(file.mode)], axis=2)


def exif_of(file):
    """-> orientation and other EXIF data, bytes, of a loaded file; 1 and b"" where they are damaged or missing."""
    try:
        exif = file.getexif()
        orientation = exif.pop(ExifTags.Base.Orientation, 1)
        for tag in set(exif) - TIFF_TAGS if file.format == "TIFF" else ():
            del exif[tag]
        return orientation, exif.tobytes() if exif else b""
    except Exception as error:  # parsers fail in many ways on damaged data
        logger.info("%s: its EXIF data are damaged (%s)", file.filename, error)
        return 1, b""


def read_open(path, file):
    """A file that is open in Pillow -> Picture."""
    if file.width * file.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    if file.format == "TIFF" and is_rare_tiff(file):
        raise ValueError(UNREADABLE)
    if getattr(file, "n_frames", 1) > 1:
        logger.info("%s: only the first of its %d frames was read", path, file.n_frames)
    # What Pillow would reduce to 8 bits. So it does with 16-bit AVIF, JPEG 2000 and PPM, which count as 8 bits here.
    mode, layout = file.mode, str(file.tile)
    deep = file.format in ("PNG", "TIFF") and mode[0] != "I" and ";16" in layout
    file.load()  # finds damage, and metadata at the file's end
    pixels = read_16_bits(path, file) if deep else channels_of(file)
    if "LA;16" in layout:  # grey with alpha, of which both make RGBA
        pixels = pixels[..., ::3]
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
        with Image.open(path, formats=tuple(set(FORMATS.values()))) as file:  # no others: EPS would start Ghostscript
            return read_open(path, file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Image.DecompressionBombError:
        most = MOST_PIXELS // 10**6
        raise UserError(f"{path} has more than {most} megapixels: reduce it, or cut it into parts.") from None
    except Exception as error:  # decoders fail in many ways on damaged files
        reason = UNREADABLE if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a picture ({reason}): convert, replace or remove it.") from error


def png_16_bits(pixels, metadata):
    """H×W(×3 or 4) uint16 -> bytes of a PNG file."""
    if pixels.ndim == 3:
        pixels = pixels.take([2, 1, 0, 3][: pixels.shape[2]], axis=2)
    encoded, chunks = cv2.imencode(".png", pixels)[1].tobytes(), io.BytesIO()
    if "icc_profile" in metadata:
        PngImagePlugin.putchunk(chunks, b"iCCP", b"ICC profile\0\0", zlib.compress(metadata["icc_profile"]))
    if "exif" in metadata:
        PngImagePlugin.putchunk(chunks, b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0"))
    start = 8 + 25  # behind the signature and the header
    return encoded[:start] + chunks.getvalue() + encoded[start:]


def tiff_16_bits(pixels, metadata):
    """H×W(×3 or 4) uint16 -> bytes of a TIFF file. Of EXIF, tifffile writes the texts of the first directory only."""
    exif, profile, buffer = Image.Exif(), metadata.get("icc_profile"), io.BytesIO()
    exif.load(metadata.get("exif", b""))
    texts = {tag: exif[tag].encode("latin-1") for tag in TIFF_TAGS & set(exif) if isinstance(exif[tag], str)}
    tags = [(tag, "s", 0, text, True) for tag, text in texts.items()]
    if profile:
        tags.append((ExifTags.Base.InterColorProfile, "B", len(profile), profile, True))
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
        if pixels.shape[2:] == (2,):  # grey with alpha, which OpenCV writes as RGBA only
            pixels = pixels.take([0, 0, 0, 1], axis=2)
        return {"PNG": png_16_bits, "TIFF": tiff_16_bits}[kind](pixels, metadata)
    if kind == "TIFF":
        options = {"compression": None if "exif" in metadata else "tiff_lzw"}  # with which Pillow fails on EXIF
    else:
        options = {"quality": quality, "subsampling": "4:4:4"}  # PNG and BMP ignore them
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options, **metadata)
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
    if path.suffix.lower() not in KEEPABLE:
        raise UserError(f"{path} cannot be written: choose one of the endings {' '.join(sorted(KEEPABLE))}.")
    kind = FORMATS[path.suffix.lower()]
    if pixels.dtype == np.uint16 and kind not in ("PNG", "TIFF"):
        raise UserError(f"{path} cannot be written, as {kind} holds no 16 bits: {WRITE_PNG}")
    if picture.alpha is not None and kind in ("JPEG", "BMP"):
        raise UserError(f"{path} cannot be written, as {kind} holds no alpha: {WRITE_PNG}")
    try:
        content = encode(pixels, kind, quality, picture.metadata)
    except Exception as error:  # of many types, for a size or metadata that a format cannot hold
        raise UserError(f"{path} cannot be written ({error}): {WRITE_PNG}") from error
    with atomic_write(path) as file:
        file.write(content)


def read_image(path):
    """-> H×W×3 uint8, of 16 bits the upper 8. Raises UserError as read_picture does."""
    pixels = read_picture(path).pixels
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def write_png(path, image):
    """Writes H×W×3 uint8 or uint16 as PNG, whole or not at all."""
    write_picture(path, Picture(image))


def peak_value(dtype):
    """-> what stands for 1: 255 of uint8, 65535 of uint16, 1 of floating point."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1


def reflect_pad(image, height, width):
    """Pads H×W×C at the bottom and right by reflection to at least height × width, repeatedly if need be."""
    missing = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")


def contact_sheet(rows, border=8):
    """Puts rows of pictures, H×W×3 uint8, on a white sheet; those of a row have one height."""
    height = sum(row[0].shape[0] + border for row in rows)
    width = max(sum(image.shape[1] + border for image in row) for row in rows)
    sheet = np.full((height + border, width + border, 3), 255, np.uint8)
    top = border
    for row in rows:
        left = border
        for image in row:
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
            left += image.shape[1] + border
        top += row[0].shape[0] + border
    return sheet
