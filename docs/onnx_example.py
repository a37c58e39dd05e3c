"""Derains an 8-bit picture with ONNX Runtime and NumPy; Pillow opens and saves the file.

pip install onnxruntime pillow
python docs/onnx_example.py nerd_rain_s.onnx rainy.jpg derained.png

The file comes from `python export.py`. One that was exported with --size takes pictures of that size only.
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MULTIPLE = 16  # of both sides

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, source, result = sys.argv[1:]
image = ImageOps.exif_transpose(Image.open(source))
if image.mode[0] in "IF":
    sys.exit(f"{source} has more than 8 bits: save it with 8.")
picture = np.asarray(image.convert("RGB"))
height, width = picture.shape[:2]
padded = np.pad(picture, [(0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)], mode="reflect")
rainy = np.float32(padded.transpose(2, 0, 1)[None]) / 255  # 1×3×H×W in [0, 1]
session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
derained = session.run(None, {"rainy": rainy})[0][0, :, :height, :width].transpose(1, 2, 0)
Image.fromarray(np.uint8(derained.clip(0, 1) * 255 + 0.5)).save(result)
