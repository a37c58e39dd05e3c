"""Weights: this repository's own and those that the authors released.

python -m utils.weights                                     lists them
python -m utils.weights NeRD-Rain-S/Rain200L                fetches some, or all

Released weights go to checkpoints/released/<network>/<data set>.pth.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from evaluations.table import paper_scores, read_facts
from model import NETWORKS
from utils import download
from utils.checkpoint import OWN_WEIGHTS, load_network, network_name
from utils.errors import UserError, listed, reports_errors, sentence

RELEASED = OWN_WEIGHTS.parent / "released"


def released_weights():
    """-> dict of (network, data set) -> where the authors put its weights."""
    return {(fact["model"], fact["dataset"]): fact for fact in read_facts("released_weights.csv")}


def load_released(network, dataset, folder=None, mirror=None):
    """The network with the released weights for a data set, which are fetched to `folder` if they are not there: from
    Google Drive, or from a mirror, a folder or a URL that holds <network>/<data set>.pth. Raises UserError."""
    released = released_weights()
    if (network, dataset) not in released:
        known = ", ".join("/".join(key) for key in released)
        wanted = "/".join(filter(None, (network, dataset)))
        raise UserError(f"no weights {wanted} were released: there are {known}.")
    fact, path = released[network, dataset], Path(folder or RELEASED) / network / f"{dataset}.pth"
    try:
        if not path.exists():
            source = download.GOOGLE_DRIVE + fact["google_drive_file_id"]
            if mirror:
                source = f"{mirror.rstrip('/')}/{network}/{dataset}.pth"
            print(f"{network} on {dataset}: fetching its weights from {source}")
            download.fetch_network(source, path, network)
        net = load_network(path)
        if network_name(net) != network:
            raise UserError(f"{path} holds {network_name(net)}, not {network}.")
    except UserError as error:
        places = " or\n  ".join(places_of(fact))
        raise UserError(
            f"{network} on {dataset} needs its weights. {sentence(error)} Download them from\n"
            f"  {places}\nand put them at {path}"
        ) from error
    return net


def places_of(fact):
    """-> where the authors put a file of weights: pages to open in a browser."""
    places = [f"https://drive.google.com/file/d/{fact['google_drive_file_id']}/view"]
    return places + ([f"{fact['baidu_url']} (code {fact['baidu_code']})"] if fact["baidu_url"] else [])


def print_list():
    """Prints a line for each file of weights: network, what it was trained on, parameters, what the paper measured with
    it, and where it is, here or at the authors'."""
    paper = paper_scores()
    print(f"{'name':31} {'trained on':16} {'parameters':>10}  {'PSNR':>5} {'SSIM':>6}  file")
    rows = [("NeRD-Rain-S", "Rain800, BSDS500", OWN_WEIGHTS, None)]
    rows += [(*key, Path(RELEASED, key[0], f"{key[1]}.pth"), fact) for key, fact in released_weights().items()]
    for network, dataset, path, fact in rows:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in NETWORKS[network]().parameters())
        score = paper.get((dataset, network))
        numbers = f"{score.psnr:5.2f} {score.ssim:.4f}" if score else f"{'–':>5} {'–':>6}"
        name = "own" if path == OWN_WEIGHTS else f"{network}/{dataset}"
        there = f"not here: {places_of(fact)[0]}" if fact else "not here: clone this repository again"
        if path.exists():
            there = f"{path.stat().st_size / 2**20:.0f} MiB, {os.path.relpath(path)}"
        print(f"{name:31} {dataset:16} {parameters / 1e6:8.2f} M  {numbers}  {there}")
    print("PSNR and SSIM are the paper's, on the test set of the same name. Own: see checkpoints/nerd_rain_s.md.")
    print("`python -m utils.weights NAME` fetches what is not here; by hand, it goes to checkpoints/released/NAME.pth.")


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK/SET", help="what to fetch; all fetches every file")
    parser.add_argument("--mirror", help="folder or URL with <network>/<set>.pth, instead of Google Drive")
    args = parser.parse_args(argv)
    wanted = ["/".join(key) for key in released_weights()] if args.names == ["all"] else args.names
    problems = []
    for name in wanted:
        try:
            network, _, dataset = name.partition("/")
            load_released(network, dataset, mirror=args.mirror)
        except UserError as error:
            problems.append(sentence(error))
    print_list()
    if problems:
        sys.exit(f"error: not all could be fetched:{listed(problems, len(problems))}")


if __name__ == "__main__":
    main()
