"""Weights: this repository's own and those that the authors released.

python -m utils.weights                             lists them
python -m utils.weights NeRD-Rain-S/Rain200L        fetches some (all: every file)

Released weights go to checkpoints/released/<network>/<data set>.pth.
"""

import argparse
import csv
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import torch

from ablations import NETWORKS, build, network_name
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.files import UserError, atomic_path, listed, reports_errors, sentence

RELEASED = OWN_WEIGHTS.parent / "released"
TIMEOUT, RETRIES = 30, 3  # seconds without a byte


def released_weights():
    """-> dict of (network, data set) -> its row in released_weights.csv: where the authors published its weights."""
    table = OWN_WEIGHTS.parent.parent / "evaluations" / "released_weights.csv"
    with open(table, newline="", encoding="utf-8") as file:
        return {(fact["model"], fact["dataset"]): fact for fact in csv.DictReader(file)}


def released_path(network, dataset, folder=None):
    return Path(folder or RELEASED, network, f"{dataset}.pth")


def places_of(fact):
    """-> pages where a file of weights can be downloaded in a browser."""
    baidu = [f"{fact['baidu_url']} (code {fact['baidu_code']})"] if fact["baidu_url"] else []
    return [f"https://drive.google.com/file/d/{fact['google_drive_file_id']}/view", *baidu]


def load_released(network, dataset, folder=None, mirror=None):
    """Loads the weights released for a data set, and fetches them first if they are not in `folder`.

    Args:
        network, dataset: a key of released_weights(), such as "NeRD-Rain-S", "Rain200L"
        folder: where weights are kept as <network>/<data set>.pth (default: RELEASED)
        mirror: folder or URL that holds such files, instead of Google Drive

    Returns the network, on the CPU. Raises UserError.
    """
    released = released_weights()
    if (network, dataset) not in released:
        names = ", ".join(map("/".join, released))
        raise UserError(f"no weights {network}/{dataset} were released. There are {names}.")
    fact, path = released[network, dataset], released_path(network, dataset, folder)
    source = f"https://drive.google.com/uc?id={fact['google_drive_file_id']}"
    if mirror:
        source = f"{str(mirror).rstrip('/')}/{network}/{dataset}.pth"
    try:
        if not path.exists():
            print(f"{network} on {dataset}: fetching its weights from {source}")
            fetch(source, path, network)
        return load_as(network, path)
    except UserError as error:
        raise UserError(
            f"{network} on {dataset} needs its weights. {sentence(error)} Download them from\n"
            f"  {' or '.join(places_of(fact))}\nand put them at {path}"
        ) from error


def load_as(network, path):
    """Loads a checkpoint that must hold the network of this name."""
    net = load_network(path)
    if network_name(net) != network:
        raise UserError(f"{path} holds {network_name(net)}, not {network}.")
    return net


def fetch(source, path, network):
    """Puts the checkpoint from a URL or file at `path` if it holds the network of this name. Raises UserError."""
    with atomic_path(path) as temporary:
        if "://" in source:
            download(source, temporary)
        elif Path(source).is_file():
            shutil.copyfile(source, temporary)
        else:
            raise UserError(f"{source} does not exist.")
        start = temporary.read_bytes()[:4096].decode(errors="replace").strip("\ufeff \r\n\t")
        if start.startswith("<"):
            title = re.search(r"<title>\s*(.*?)\s*</title>", start, re.IGNORECASE | re.DOTALL)
            raise UserError(f"{source} sent a web page instead of weights ({title[1] if title else 'untitled'}).")
        try:
            load_as(network, temporary)
        except UserError as error:
            raise UserError(sentence(error).replace(str(temporary), source)) from error


def download(url, path):
    """Downloads a file, also from Google Drive. gdown keeps what an interrupted download received, and resumes it."""
    try:
        import gdown
    except ImportError:
        raise UserError("downloads need gdown: pip install 'gdown>=6'.") from None
    received = path.with_name(f".{zlib.crc32(url.encode()):08x}.download")  # not to be resumed from another URL
    try:
        gdown.download(url, str(received), resume=True, retries=RETRIES, timeout=TIMEOUT, use_cookies=False)
        os.replace(received, path)
    except (gdown.exceptions.DownloadError, OSError) as error:
        reason = " ".join(str(error).partition("\nThe received bytes")[0].split()).rstrip(".")
        parts = [str(part) for part in path.parent.glob(f"{received.name}*.part")]
        hint = f" Repeat the command to resume it, or remove {parts[0]} to start over." if parts else ""
        raise UserError(f"{url} could not be fetched ({reason}).{hint}") from error


def print_list():
    """Prints a line for each file of weights: name, training data, parameters, and where the file is."""
    rows = [("own", "NeRD-Rain-S", "Rain800, BSDS500", OWN_WEIGHTS, "clone this repository again")]
    for (network, dataset), fact in released_weights().items():
        rows.append((f"{network}/{dataset}", network, dataset, released_path(network, dataset), places_of(fact)[0]))
    print(f"{'name':31} {'trained on':16} {'parameters':>10}  file")
    for name, network, dataset, path, source in rows:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build(**NETWORKS[network]).parameters())
        place = os.path.relpath(path) if path.exists() else f"not here: {source}"
        print(f"{name:31} {dataset:16} {parameters / 1e6:8.2f} M  {place}")


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK/SET", help="what to fetch; all fetches every file")
    parser.add_argument("--mirror", help="folder or URL with <network>/<set>.pth, instead of Google Drive")
    args = parser.parse_args(argv)
    problems = []
    for name in map("/".join, released_weights()) if args.names == ["all"] else args.names:
        try:
            network, _, dataset = name.partition("/")
            load_released(network, dataset, mirror=args.mirror)
        except UserError as error:
            problems.append(sentence(error))
    print_list()
    if problems:
        sys.exit(f"error: not all weights could be fetched:{listed(problems)}")


if __name__ == "__main__":
    main()
