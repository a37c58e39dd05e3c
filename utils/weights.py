"""Weights: this repository's own and those that the authors released.

python -m utils.weights                             lists them
python -m utils.weights NeRD-Rain-S/Rain200L        fetches some (all: every file)

Released weights go to checkpoints/released/<network>/<data set>.pth.
"""

import argparse
import csv
import os
import shutil
import sys
import zlib
from pathlib import Path

from ablations import network_name
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.files import UserError, atomic_path, listed, reports_errors

RELEASED = OWN_WEIGHTS.parent / "released"
TIMEOUT, RETRIES = 30, 3  # seconds without a byte


def read_facts(name):
    """-> rows of a table in evaluations/, as dicts."""
    with open(OWN_WEIGHTS.parent.parent / "evaluations" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def released_weights():
    """-> dict of (network, data set) -> its row in released_weights.csv: where the authors published its weights."""
    return {(fact["model"], fact["dataset"]): fact for fact in read_facts("released_weights.csv")}


def released_path(network, dataset):
    return RELEASED / network / f"{dataset}.pth"


def pages_of(fact):
    """-> where a file of weights can be downloaded in a browser."""
    baidu = f" or {fact['baidu_url']} (code {fact['baidu_code']})" if fact["baidu_url"] else ""
    return f"https://drive.google.com/file/d/{fact['google_drive_file_id']}/view{baidu}"


def load_released(network, dataset, mirror=None):
    """Loads the weights released for a data set, and fetches them first if they are not here.

    Args:
        network, dataset: a key of released_weights(), such as "NeRD-Rain-S", "Rain200L"
        mirror: folder or URL that holds such files, instead of Google Drive

    Returns the network, on the CPU. Raises UserError.
    """
    released = released_weights()
    if (network, dataset) not in released:
        names = ", ".join(map("/".join, released))
        raise UserError(f"no weights {network}/{dataset} were released. There are {names}.")
    fact, path = released[network, dataset], released_path(network, dataset)
    source = f"https://drive.google.com/uc?id={fact['google_drive_file_id']}"
    if mirror:
        source = f"{str(mirror).rstrip('/')}/{network}/{dataset}.pth"
    try:
        if path.exists():
            return load_as(network, path)
        print(f"{network} on {dataset}: fetching its weights from {source}")
        return fetch(source, path, network)
    except UserError as error:
        raise UserError(
            f"the weights {network}/{dataset} cannot be loaded. {error} Download them from\n  "
            f"{pages_of(fact)}\nand put them at {path}"
        ) from error


def load_as(network, path):
    """Loads a checkpoint that must hold the network of this name."""
    net = load_network(path)
    if network_name(net) != network:
        raise UserError(f"{path} holds {network_name(net)}, not {network}.")
    return net


def fetch(source, path, network):
    """Puts the checkpoint from a URL or file at `path` if it holds the network of this name -> the network."""
    with atomic_path(path) as temporary:
        if "://" in source:
            download(source, temporary)
        elif Path(source).is_file():
            shutil.copyfile(source, temporary)
        else:
            raise UserError(f"{source} does not exist.")
        try:
            return load_as(network, temporary)
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), source)) from error


def download(url, path):
    """Downloads a file, also from Google Drive. gdown keeps what an interrupted download received, and resumes it."""
    try:
        import gdown
    except ImportError:
        raise UserError("downloads need gdown: pip install 'gdown>=6.3'.") from None
    received = path.with_name(f".{zlib.crc32(url.encode()):08x}.download")  # not to be resumed from another URL
    try:
        gdown.download(url, str(received), resume=True, retries=RETRIES, timeout=TIMEOUT, use_cookies=False)
    except (gdown.exceptions.DownloadError, OSError) as error:
        reason = " ".join(str(error).partition("\nThe received bytes")[0].split()).rstrip(".")
        raise UserError(f"{url} could not be fetched ({reason}): the same command resumes it.") from error
    os.replace(received, path)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK/SET", help="what to fetch; all fetches every file")
    parser.add_argument("--mirror", help="folder or URL with <network>/<set>.pth, instead of Google Drive")
    args = parser.parse_args(argv)
    problems, released = [], released_weights()
    for name in map("/".join, released) if args.names == ["all"] else args.names:
        try:
            network, _, dataset = name.partition("/")
            load_released(network, dataset, mirror=args.mirror)
        except UserError as error:
            problems.append(str(error))
    files = [("own (NeRD-Rain-S)", OWN_WEIGHTS, "this repository")]
    files += [("/".join(key), released_path(*key), pages_of(fact)) for key, fact in released.items()]
    for name, path, pages in files:
        print(f"{name:26} {os.path.relpath(path) if path.exists() else f'not here: {pages}'}")
    if problems:
        sys.exit(f"error: not all weights could be fetched:{listed(problems)}")


if __name__ == "__main__":
    main()
