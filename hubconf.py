"""Entry points of torch.hub: the paper's networks, with or without weights, and `derain`.

torch.hub.load("path/of/this/repository", "nerd_rain_s", source="local", pretrained=True)

`pretrained` is False for random weights, True for this repository's own, or the name of the data set for which the
authors released weights, such as "Rain200L": those are fetched. Networks with weights are in evaluation mode.
"""

from ablations import NETWORKS, build
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import derain as derain
from utils.files import UserError
from utils.weights import load_released, released_weights

dependencies = ["cv2", "numpy", "PIL", "tifffile", "torch", "torchvision", "tqdm"]
OWN = "NeRD-Rain-S"  # the network of this repository's own weights


def load(network, pretrained):
    if not pretrained:
        return build(**NETWORKS[network])
    if pretrained is not True:
        return load_released(network, str(pretrained)).eval()
    if network != OWN:
        datasets = ", ".join(repr(dataset) for name, dataset in released_weights() if name == network)
        raise UserError(f"this repository has no weights of {network}; the authors' are pretrained={datasets}.")
    return load_network(OWN_WEIGHTS).eval()


def nerd_rain(pretrained=False):
    """NeRD-Rain, 22,893,146 parameters."""
    return load("NeRD-Rain", pretrained)


def nerd_rain_s(pretrained=False):
    """NeRD-Rain-S, 10,530,314 parameters."""
    return load("NeRD-Rain-S", pretrained)


def nerd_rain_mprnet(pretrained=False):
    """NeRD-Rain-MPRNet, 22,983,411 parameters; the authors released weights of it for "unstated"."""
    return load("NeRD-Rain-MPRNet", pretrained)
