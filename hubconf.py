"""Entry points of torch.hub: the three networks, with or without weights, and `derain`.

torch.hub.load("path/of/this/repository", "nerd_rain_s", source="local", pretrained=True)

`pretrained` is False for random weights, True for this repository's own (NeRD-Rain-S has some), or the name of the data
set for which the authors released weights, which are fetched: "Rain200L", "Rain200H", "DID-Data", "DDN-Data" or
"SPA-Data". Networks with weights are in evaluation mode; those without take the options of model.MultiscaleNet.
"""

from model import NETWORKS
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.errors import UserError
from utils.inference import derain as derain
from utils.weights import load_released, released_weights

dependencies = ["cv2", "numpy", "PIL", "tifffile", "torch", "torchvision", "tqdm"]


def build(name, pretrained, options):
    if not pretrained:
        return NETWORKS[name](**options)
    if options:
        raise UserError(f"weights fit the published networks only: leave {', '.join(options)} away.")
    if pretrained is not True:
        return load_released(name, str(pretrained)).eval()
    if name != "NeRD-Rain-S":
        released = ", ".join(repr(dataset) for network, dataset in released_weights() if network == name)
        raise UserError(f"this repository has no weights of {name} of its own; the authors' are pretrained={released}.")
    return load_network(OWN_WEIGHTS).eval()


def nerd_rain(pretrained=False, **options):
    """NeRD-Rain: 22,893,146 parameters. `pretrained`: False, or the data set of the authors' weights, such as
    "Rain200L"; `options` of model.MultiscaleNet go with False only."""
    return build("NeRD-Rain", pretrained, options)


def nerd_rain_s(pretrained=False, **options):
    """NeRD-Rain-S: 10,530,314 parameters. `pretrained`: False; True for this repository's own weights; or the data set
    of the authors', such as "Rain200L". `options` of model.MultiscaleNet go with False only."""
    return build("NeRD-Rain-S", pretrained, options)


def nerd_rain_mprnet(pretrained=False, **options):
    """NeRD-Rain-MPRNet: 22,983,411 parameters. `pretrained`: False, or "unstated", the authors' weights of a data set
    that they do not name; `options` of model.MultiscaleNet go with False only."""
    return build("NeRD-Rain-MPRNet", pretrained, options)
