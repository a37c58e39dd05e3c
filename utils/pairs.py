"""Which rainy picture belongs to which clean one, and the data sets that are known. Needs no torch."""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import UserError, counted, listed
from utils.pictures import find_pictures, read_image


class Pair(NamedTuple):
    """Paths of a rainy picture and its clean one, or of one picture whose `clean_half` is "left" or "right"."""

    input: Path
    target: Path
    clean_half: str | None = None

    def read(self):
        """-> rainy and clean picture, H×W×3 uint8 each. Raises UserError if they do not fit together."""
        if self.clean_half:
            image = read_image(self.input)
            if image.shape[1] % 2:
                raise UserError(f"{self.input} is {image.shape[1]} pixels wide: two equal halves need an even width.")
            left, right = np.split(image, 2, axis=1)
            return (right, left) if self.clean_half == "left" else (left, right)
        rainy, clean = read_image(self.input), read_image(self.target)
        if rainy.shape != clean.shape:
            sizes = [f"{image.shape[1]}×{image.shape[0]}" for image in (rainy, clean)]
            raise UserError(
                f"{self.input} ({sizes[0]}) and {self.target} ({sizes[1]}) differ in size: replace or remove this pair."
            )
        return rainy, clean


class Recipe(NamedTuple):
    """What is known of a data set: its size, its evaluation protocol, where to get it, and how the authors trained on
    it (`num_epochs` is None where they did not)."""

    train_pairs: int
    test_pairs: int
    protocol: str = "rain200"
    url: str = ""
    code: str = ""
    num_epochs: int | None = None
    model: str = "NeRD-Rain"
    patch_size: int = 256
    batch_size: int = 1
    lr: float = 1e-4
    clip_grad: float | None = None
    ema: float | None = None


BAIDU = "https://pan.baidu.com/s/"
DATASETS = {
    "Rain200L": Recipe(1800, 200, "rain200", BAIDU + "1rTb4qU3fCEA4MRpQss__DA", "s2yx", num_epochs=600),
    "Rain200H": Recipe(1800, 200, "rain200", BAIDU + "1KK8R2bPKgcOX8gMXSuKtCQ", "z9br", num_epochs=600),
    "DID-Data": Recipe(12000, 1200, "did", BAIDU + "1aPFJExxxTBOzJjngMAOQDA", "5luo", num_epochs=200),
    "DDN-Data": Recipe(12600, 1400, "did", BAIDU + "1g_m7RfSUJUtknlWugO1nrw", "ldzo", num_epochs=200),
    "SPA-Data": Recipe(638492, 1000, "rain200", BAIDU + "1YfxC5OvgYcQCffEttFz8Kg", "yjow", num_epochs=10),
    "Rain100L": Recipe(200, 100),
    "Rain100H": Recipe(1800, 100),
    "Rain800": Recipe(700, 100),
    "Rain12": Recipe(0, 12),
    # Learns something within minutes on a laptop. The others are the paper's recipes.
    "demo": Recipe(18, 4, num_epochs=36, model="NeRD-Rain-S", patch_size=64, lr=5e-4, clip_grad=0.5, ema=0.98),
}


def known_dataset(path):
    """-> the name in DATASETS of a folder's data set, None if it has another name: Rain200L for
    Datasets/Rain200L/test/target and for results/NeRD-Rain/Rain200L."""
    parts = [part.lower() for part in Path(os.path.abspath(path)).parts]
    while parts and parts[-1] in ("train", "test", "input", "target"):
        parts.pop()
    return next((name for name in DATASETS if parts and name.lower() == parts[-1]), None)


def how_to_get(name):
    """-> a sentence on where to get a data set and where to put it."""
    if name == "demo":
        return "it is part of this repository: `git checkout Datasets/demo` restores it."
    recipe = DATASETS[name]
    place = f"from {recipe.url} (code {recipe.code})" if recipe.url else "as Datasets/README.md says"
    return (
        f"{name} ({recipe.train_pairs} training and {recipe.test_pairs} test pairs) can be downloaded {place}. Put "
        f"rainy pictures into Datasets/{name}/train/input and Datasets/{name}/test/input, and clean ones into target/ "
        "beside each; `python -m utils.prepare` does this for the original distributions."
    )


def rainy_folder(source):
    """-> where a data set keeps its rainy test pictures; any other source as it is."""
    for folder in (Path(source, "test"), Path(source)):
        if (folder / "input").is_dir() and (folder / "target").is_dir():
            return folder / "input"
    return source


def clean_folder(root):
    """-> where a data set keeps its clean test pictures: root/test/target, root/target or root itself."""
    return next((folder for folder in (Path(root, "test/target"), Path(root, "target")) if folder.is_dir()), Path(root))


def target_names(stem):
    """-> stems of clean pictures that may belong to a rainy one, the likeliest first: the same name; 901 for 901_14
    (DDN-Data, several rainy pictures of a scene); norain-7 for norain-7x2 (Rain200L/H); norain-007 for rain-007
    (Rain100L/H); 7_GT for 7_DR (derained and clean pictures in the MATLAB scripts for DID-Data and DDN-Data)."""
    patterns = (r"_\d+$", ""), (r"x2$", ""), (r"^rain", "norain"), (r"_DR$", "_GT")
    return [stem, *(re.sub(pattern, replacement, stem) for pattern, replacement in patterns)]


def match_by_name(inputs, targets, input_root, target_root):
    """Pairs paths by their names below two folders, whatever their endings. Clean pictures may be left over.

    Returns:
        list of Pair in the order of `inputs`, list of sentences about what cannot be paired.
    """
    rainy, clean = defaultdict(list), defaultdict(list)  # names: paths
    for path in inputs:
        rainy[path.relative_to(input_root).with_suffix("")].append(path)
    for path in targets:
        clean[path.relative_to(target_root).with_suffix("")].append(path)
    ambiguous = [paths for paths in (*rainy.values(), *clean.values()) if len(paths) > 1]
    pairs, problems = [], [f"{' and '.join(map(str, paths))} have the same name" for paths in ambiguous]
    for name, paths in rainy.items():
        if len(paths) > 1:
            continue
        candidates = [name.parent / stem for stem in target_names(name.name)]
        # A clean picture that has the name of another rainy one belongs to that one.
        fitting = [c for c in candidates if c in clean and (c == name or c not in rainy)]
        if fitting:
            pairs.append(Pair(paths[0], clean[fitting[0]][0]))
        else:
            problems.append(f"{paths[0]} has no clean picture in {target_root}")
    return pairs, problems


def pair_folder(root, clean_half=None):
    """Pairs the pictures of a data set's folder.

    Args:
        root: folder with input/ and target/, or with pictures that hold both side by side.
        clean_half: "left" or "right" of pictures side by side; folders with input/ and target/ ignore it.

    Returns:
        list of Pair, list of sentences about pictures without a partner.

    Raises:
        UserError: if there are no pictures.
    """
    root = Path(root)
    inputs, targets = root / "input", root / "target"
    missing = [folder for folder in (inputs, targets) if not folder.is_dir()]
    if len(missing) == 2 and root.is_dir() and clean_half:
        return [Pair(path, path, clean_half) for path in find_pictures(root)[0]], []
    if not root.is_dir() and known_dataset(root):
        raise UserError(f"{root} does not exist: {how_to_get(known_dataset(root))}")
    if missing:
        raise UserError(
            f"{missing[0]} does not exist: put rainy pictures in {inputs} and clean ones in {targets}, or use "
            "--clean_half left or --clean_half right for pictures that hold both side by side."
        )
    rainy, clean = find_pictures(inputs)[0], find_pictures(targets)[0]
    pairs, problems = match_by_name(rainy, clean, inputs, targets)
    used = {pair.target for pair in pairs}
    return pairs, problems + [f"{path} has no rainy picture in {inputs}" for path in clean if path not in used]


def find_pairs(root, clean_half=None):
    """-> list of Pair of a data set's folder, as pair_folder finds them.

    Raises UserError if there are none or if pictures have no partner.
    """
    pairs, problems = pair_folder(root, clean_half)
    if problems:
        count = counted(len(problems), "picture")
        raise UserError(f"{count} in {root} cannot be paired: add what is missing or remove them.{listed(problems)}")
    return pairs


def hold_out(pairs, fraction, seed):
    """Splits pairs into (for training, for validation); all pairs of one clean picture stay together."""
    targets = sorted({pair.target for pair in pairs})
    if len(targets) < 2:
        raise UserError("--hold_out needs at least two clean pictures: add some, or give --val_dir instead.")
    count = min(max(1, round(len(targets) * fraction)), len(targets) - 1)
    held_out = {targets[i] for i in np.random.default_rng(seed).permutation(len(targets))[:count]}
    return [p for p in pairs if p.target not in held_out], [p for p in pairs if p.target in held_out]
