"""Finding pictures, and pictures as 8-bit RGB arrays H×W×3 and as tensors. Their files: utils/formats.py."""

import glob
import itertools
import os
from os.path import join, realpath
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.formats import Picture, read_picture, write_picture

EXTENSIONS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".tga", ".jp2"),
}


def is_picture(path):
    """Whether a path is named like a picture and is a file, or a link that leads nowhere: reading it will say so."""
    named = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))


def pictures_in(tree):
    """Yields the pictures in a folder tree, and those of its folders that cannot be read: reading them will say so."""
    locked = []
    for folder, _, names in os.walk(tree, onerror=locked.append):
        yield from filter(is_picture, (Path(folder, name) for name in names))
    for error in locked:
        if Path(error.filename) == Path(tree):
            raise error
        yield Path(error.filename)


def holds_pictures(folder):
    """Whether a folder is there, with a picture in its tree."""
    return Path(folder).is_dir() and any(is_picture(path) for path in Path(folder).rglob("*"))


def find_pictures(source, results=()):
    """The pictures of a file, a folder tree or a glob pattern -> (sorted paths, the folder they are relative to).

    What lies in the folders `results` within that folder is left out: an earlier run wrote it. Raises UserError if
    there are no pictures.
    """
    path = Path(source)
    if not str(source):
        raise UserError('an empty name stands for no picture: give a picture or a folder, "." for this one.')
    if path.is_dir():
        root, found = path, list(pictures_in(path))
    elif path.is_file():
        root, found = path.parent, [path]
    elif glob.has_magic(str(source)):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [p for p in map(Path, glob.glob(str(source), recursive=True)) if is_picture(p)]
    else:
        raise UserError(
            f"{source} does not exist: give a picture, a folder or a quoted pattern such as 'photos/*.jpg'."
        )
    if not found:
        raise UserError(
            f"{source} holds no pictures: the endings looked for are {' '.join(sorted(EXTENSIONS))}. Clips are "
            "given by name or quoted pattern, such as 'holiday/*.mp4'."
        )
    top = join(realpath(root), "")
    results = (join(realpath(path), "") for path in results)
    within = tuple(folder for folder in results if folder != top and folder.startswith(top))
    originals = [path for path in found if not join(realpath(path.parent), "").startswith(within)]
    if not originals:
        raise UserError(f"{source} holds results of earlier runs only: give the pictures that they were made from.")
    return sorted(originals), root


def read_image(path):
    """Reads any picture as 8-bit RGB; alpha is dropped, of 16 bits the upper 8 are kept. Errors as in read_picture."""
    return eight_bits(read_picture(path).pixels)


def eight_bits(pixels):
    """uint8 or uint16 -> uint8."""
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def write_png(path, image):
    """Writes H×W×3 uint8; a file of that name is replaced only once the new one is complete."""
    write_picture(path, Picture(image))


def reflect_pad(image, height, width):
    """Pads H×W×C at the bottom and right by reflection, repeated where the picture is too short for a single one."""
    missing = (max(0, height - image.shape[0]), max(0, width - image.shape[1]))
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")


def peak_value(dtype):
    """-> what stands for 1: 255 for uint8, 65535 for uint16, 1 for floating-point pictures."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1


def to_tensor(image):
    """H×W×3 uint8, uint16 or float32 in [0, 1] -> 3×H×W float32 in [0, 1]."""
    values = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(values) / peak_value(image.dtype)


def to_image(tensor, dtype=np.uint8):
    """3×H×W float in [0, 1] (clamped) -> H×W×3 of that type; integers are rounded to nearest."""
    values = tensor.clamp(0, 1).permute(1, 2, 0).float().cpu()
    if np.issubdtype(dtype, np.integer):
        values = (values * peak_value(dtype)).round()
    return np.ascontiguousarray(values.numpy().astype(dtype))


def contact_sheet(rows, border=8):
    """Pastes rows of pictures of any sizes into one white sheet; each row is scaled to its first picture's height."""
    rows = [[Image.fromarray(image) for image in row] for row in rows]
    for row in rows:
        row[:] = [p.resize((round(p.width * row[0].height / p.height), row[0].height)) for p in row]
    width = max(sum(p.width + border for p in row) for row in rows) + border
    sheet = Image.new("RGB", (width, sum(row[0].height + border for row in rows) + border), "white")
    y = border
    for row in rows:
        x = border
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + border
        y += row[0].height + border
    return np.asarray(sheet)
