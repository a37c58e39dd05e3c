"""Deraining pictures of any size, by the published test procedure."""

import torch

from model import MULTIPLE
from utils.images import read_image, reflect_pad, to_image, to_tensor, write_png


def spans(side, window):
    """Windows along one side -> list of (start, first pixel that is used of it). They lie on a grid from 0; where that
    does not end at the edge, a last window is taken flush with it and only its uncovered strip is used."""
    grid = [(start, start) for start in range(0, side - window + 1, window)]
    covered = len(grid) * window
    return grid if covered == side else [*grid, (side - window, covered)]


@torch.inference_mode()
def derain_windows(net, picture, window=256, bf16=False):
    """3×H×W float32 in [0, 1] -> the derained picture, likewise, on the CPU; H and W are at least 16 and, where they
    are below the window, multiples of 16. Each window runs through the network alone."""
    weights = next(net.parameters())
    rows, columns = (min(window, side) for side in picture.shape[1:])
    result = torch.empty_like(picture)
    for top, used_top in spans(picture.shape[1], rows):
        for left, used_left in spans(picture.shape[2], columns):
            piece = picture[None, :, top : top + rows, left : left + columns]
            piece = piece.to(weights.device, memory_format=torch.channels_last)
            with torch.autocast(weights.device.type, torch.bfloat16, enabled=bf16):
                clean = net(piece)[0][0].float().clamp(0, 1).cpu()
            result[:, used_top : top + rows, used_left : left + columns] = clean[
                :, used_top - top :, used_left - left :
            ]
    return result


def derain(net, image, window=256, bf16=False):
    """H×W×3 uint8 RGB -> the derained picture, likewise, by windows of window×window pixels.

    A side shorter than the window is reflected to the next multiple of 16. The window changes the result a little, as
    channel attention sees all of it; 256 is what the paper's tables were made with. `bf16` computes in bfloat16, which
    changes some values by a level or two.
    """
    if window < MULTIPLE or window % MULTIPLE:
        raise ValueError(f"the window must be a multiple of {MULTIPLE}, not {window}")
    height, width = image.shape[:2]
    padded = reflect_pad(
        image, *(-(-side // MULTIPLE) * MULTIPLE if side < window else side for side in (height, width))
    )
    return to_image(derain_windows(net, to_tensor(padded), window, bf16))[:height, :width]


def derain_file(net, path, output, window=256, bf16=False):
    """Derains the picture at `path` into a PNG at `output` -> both pictures."""
    rainy = read_image(path)
    derained = derain(net, rainy, window, bf16)
    write_png(output, derained)
    return rainy, derained
