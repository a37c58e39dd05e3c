"""Which picture belongs to which, and the data sets that are known. No torch here: pairing files needs none."""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import UserError, counted, listed
from utils.pictures import find_pictures, is_picture, read_image


class Pair(NamedTuple):
    """Paths of a rainy picture and its clean one; for a side-by-side picture `clean_half` says which half is clean."""

    input: Path
    target: Path
    clean_half: str | None = None

    def read(self):
        """-> rainy and clean picture, H×W×3 uint8 each. Raises UserError where they do not belong together."""
        if self.clean_half:
            image = read_image(self.input)
            if image.shape[1] % 2:
                raise UserError(
                    f"{self.input} is {image.shape[1]} pixels wide: two halves side by side need an even width."
                )
            left, right = np.split(image, 2, axis=1)
            return (right, left) if self.clean_half == "left" else (left, right)
        rainy, clean = read_image(self.input), read_image(self.target)
        if rainy.shape != clean.shape:
            sizes = [f"{path} ({i.shape[1]}×{i.shape[0]})" for path, i in ((self.input, rainy), (self.target, clean))]
            raise UserError(f"{sizes[0]} and {sizes[1]} are not of one size: replace or remove this pair.")
        return rainy, clean


class Recipe(NamedTuple):
    """What is known of a data set: how much there is, how it is measured, where it can be had, and how the authors
    trained on it (`num_epochs` is None where they did not)."""

    train_pairs: int
    test_pairs: int
    protocol: str = "rain200"
    url: str = ""
    code: str = ""
    num_epochs: int | None = None
    model: str = "nerd_rain"
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
    # What learns something within minutes on a laptop; the paper's are the authors' recipes.
    "demo": Recipe(18, 4, num_epochs=36, model="nerd_rain_s", patch_size=64, lr=5e-4, clip_grad=0.5, ema=0.98),
}


def known_dataset(path):
    """The name in DATASETS of the data set that a folder belongs to: Rain200L of Datasets/Rain200L/test/target and of
    results/NeRD-Rain/Rain200L. None if it has another name."""
    parts = [part.lower() for part in Path(os.path.abspath(path)).parts]
    while parts and parts[-1] in ("train", "test", "input", "target"):
        parts.pop()
    return next((name for name in DATASETS if parts and name.lower() == parts[-1]), None)


def how_to_get(dataset):
    """-> a sentence on where a data set can be had and where to put it."""
    recipe = DATASETS[dataset]
    if dataset == "demo":
        return "it is part of this repository, git checkout brings it back."
    place = f"from {recipe.url} (code {recipe.code})" if recipe.url else "as Datasets/README.md says"
    return (
        f"{dataset} ({recipe.train_pairs} training and {recipe.test_pairs} test pairs) can be downloaded {place}. Put "
        "it into\n"
        f"  Datasets/{dataset}/train/input   Datasets/{dataset}/train/target\n"
        f"  Datasets/{dataset}/test/input    Datasets/{dataset}/test/target\n"
        "with rainy pictures in input/ and clean ones in target/ (`python -m utils.prepare` does that with the "
        "original distributions; Datasets/README.md says more)."
    )


def target_names(stem):
    """Stems of clean pictures that a rainy one may belong to, the likeliest first: the same name; 901_14 -> 901
    (DDN-Data, several rainy pictures of one scene); norain-7x2 -> norain-7 (Rain200L/H); rain-007 -> norain-007
    (Rain100L/H); 7_DR -> 7_GT (derained and clean pictures in the MATLAB scripts for DID-Data and DDN-Data)."""
    patterns = (r"_\d+$", ""), (r"x2$", ""), (r"^rain", "norain"), (r"_DR$", "_GT")
    return [stem, *(re.sub(pattern, replacement, stem) for pattern, replacement in patterns)]


def match_by_name(inputs, targets, input_root, target_root):
    """Pairs paths by their names below two roots, whatever their endings -> list of Pair in the order of `inputs`, list
    of sentences about what cannot be paired. Clean pictures may be left over."""
    rainy, clean = defaultdict(list), defaultdict(list)
    for path in inputs:
        rainy[path.relative_to(input_root).with_suffix("")].append(path)
    for path in targets:
        clean[path.relative_to(target_root).with_suffix("")].append(path)
    pairs, problems = [], []
    for paths in (*rainy.values(), *clean.values()):
        if len(paths) > 1:
            problems.append(f"{' and '.join(map(str, paths))} have one name")
    for name, paths in rainy.items():
        if len(paths) > 1:
            continue
        candidates = [name.parent / candidate for candidate in target_names(name.name)]
        # A picture that another rainy one is named after is not the clean one of this, too.
        fitting = [c for c in candidates if c in clean and (c == name or c not in rainy)]
        if fitting:
            pairs.append(Pair(paths[0], clean[fitting[0]][0]))
        else:
            problems.append(f"{paths[0]} has no clean picture in {target_root}")
    return pairs, problems


def pair_folder(root, clean_half=None):
    """Pairs up a data set -> list of Pair, list of sentences about pictures without a partner.

    `root` holds input/ and target/ with pictures of the same names or, with `clean_half` "left" or "right", pictures
    whose two halves are the pair. Raises UserError if there are none.
    """
    root = Path(root)
    if clean_half:
        return [Pair(path, path, clean_half) for path in find_pictures(root)[0]], []
    folders = root / "input", root / "target"
    for folder in folders:
        if not folder.is_dir():
            hint = ""
            if root.is_dir() and any(is_picture(path) for path in root.iterdir()):
                hint = " For pictures with rainy and clean halves side by side, say --clean_half left or right."
            if not root.is_dir() and known_dataset(root):
                raise UserError(f"{root} does not exist: {how_to_get(known_dataset(root))}")
            raise UserError(
                f"{folder} does not exist: put rainy pictures in {folders[0]}, clean ones in {folders[1]}.{hint}"
            )
    inputs, targets = (find_pictures(folder)[0] for folder in folders)
    pairs, problems = match_by_name(inputs, targets, *folders)
    used = {pair.target for pair in pairs}
    return pairs, problems + [f"{path} has no rainy picture in {folders[0]}" for path in targets if path not in used]


def find_pairs(root, clean_half=None):
    """All pairs of a data set as `pair_folder` finds them -> list of Pair.

    Raises UserError if there are none or if pictures are without a partner.
    """
    pairs, problems = pair_folder(root, clean_half)
    if problems:
        what = counted(len(problems), "picture")
        raise UserError(f"{what} cannot be paired: add what is missing or remove them.{listed(problems, 20)}")
    return pairs


def hold_out(pairs, fraction, seed):
    """Splits pairs into (for training, for validation) so that all pictures of one clean picture stay together."""
    targets = sorted({pair.target for pair in pairs})
    if len(targets) < 2:
        raise UserError("--hold_out needs pictures of at least two scenes.")
    count = min(max(1, round(len(targets) * fraction)), len(targets) - 1)
    held_out = {targets[i] for i in np.random.default_rng(seed).permutation(len(targets))[:count]}
    return [p for p in pairs if p.target not in held_out], [p for p in pairs if p.target in held_out]
