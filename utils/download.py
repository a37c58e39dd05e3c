"""Fetching released weights: a file takes its place only after it has been loaded as the network it should hold."""

import os
import re
import shutil
from pathlib import Path

from utils.checkpoint import load_network, network_name
from utils.errors import UserError, sentence

GOOGLE_DRIVE = "https://drive.google.com/uc?id="
PATIENCE = 30  # seconds without a byte
RETRIES = 3


def fetch_network(source, path, name):
    """Puts the checkpoint from `source`, a URL or a file, at `path` if it holds the network called `name`.

    What a cut connection leaves is kept beside `path` and continued by the next call. Raises UserError where the source
    cannot be had or is something else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrived = path.with_name(f".{path.name}.arrived")
    try:
        if "://" in str(source):
            download(source, arrived)
        elif Path(source).is_file():
            shutil.copyfile(source, arrived)
        else:
            raise UserError(f"{source} does not exist.")
        found = network_name(load_network(arrived))
        if found != name:
            raise UserError(f"{source} holds {found}, not {name}.")
        os.replace(arrived, path)
    except UserError as error:
        raise UserError(page_title(arrived, source) or sentence(error).replace(str(arrived), str(source))) from error
    finally:
        arrived.unlink(missing_ok=True)


def download(url, path):
    """Downloads a file, also from Google Drive, continuing where an earlier call was cut off."""
    try:
        import gdown
    except ImportError:
        raise UserError("downloads need gdown: pip install 'gdown>=6'.") from None

    def attempt():
        gdown.download(url, str(path), resume=True, retries=RETRIES, timeout=PATIENCE, use_cookies=False)

    try:
        try:
            attempt()
        except gdown.exceptions.DownloadError as error:
            if "byte range" not in str(error):
                raise
            for part in path.parent.glob(f"{path.name}*.part"):  # this host cannot continue: from the start, then
                part.unlink()
            attempt()
    except (gdown.exceptions.DownloadError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{url} could not be fetched ({reason}).") from error


def page_title(path, source):
    """What a host sent in place of a file -> a sentence with the web page's title, or None if it is no web page."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(4096).decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
    if not re.match(r"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        return None
    title = re.search(r"<title>\s*(.*?)\s*</title>", start, re.IGNORECASE | re.DOTALL)
    return f"{source} sent a web page instead of weights ({title[1] if title else 'untitled'})."
