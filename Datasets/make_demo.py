"""Makes Datasets/demo from photographs that scikit-image ships (sources and licences: Datasets/README.md).

python -m Datasets.make_demo
"""

import argparse
import tempfile
from pathlib import Path

import cv2
from skimage import data

from utils import rain
from utils.pictures import read_image, write_png

WIDTH = 360
PHOTOGRAPHS = {
    "train": (["coffee", "rocket", "camera", "brick", "grass", "gravel"], 3),
    "test": (["astronaut", "chelsea"], 2),
}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shipped = Path(data.__file__).parent
    for split, (names, versions) in PHOTOGRAPHS.items():
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                photograph = read_image(next(shipped.glob(f"{name}.*")))
                height = round(photograph.shape[0] * WIDTH / photograph.shape[1])
                small = cv2.resize(photograph, (WIDTH, height), interpolation=cv2.INTER_AREA)
                write_png(Path(folder, f"{name}.png"), small)
            rain.main([folder, f"Datasets/demo/{split}", "--versions", str(versions)])


if __name__ == "__main__":
    main()
