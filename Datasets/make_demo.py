"""Makes Datasets/demo from photographs that scikit-image ships (sources and licences: Datasets/README.md).

python -m Datasets.make_demo
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from skimage import data

from utils.pictures import read_image, write_png
from utils.rain import add_rain

WIDTH, SEED = 360, 1234
PHOTOGRAPHS = {  # in the order of their names, and the rain of each one's versions; None: any
    "train": (["brick", "camera", "coffee", "grass", "gravel", "rocket"], [None, None, None]),
    "test": (["astronaut", "chelsea"], ["light", "heavy"]),
}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    output, shipped = Path("Datasets/demo"), Path(data.__file__).parent
    for split, (names, styles) in PHOTOGRAPHS.items():
        for number, name in enumerate(names):
            photograph = read_image(next(shipped.glob(f"{name}.*")))
            height = round(photograph.shape[0] * WIDTH / photograph.shape[1])
            clean = cv2.resize(photograph, (WIDTH, height), interpolation=cv2.INTER_AREA)
            write_png(output / split / "target" / f"{name}.png", clean)
            for version, style in enumerate(styles, start=1):
                rng = np.random.default_rng((SEED, number, version))
                write_png(output / split / "input" / f"{name}_{version}.png", add_rain(clean, rng, style))


if __name__ == "__main__":
    main()
