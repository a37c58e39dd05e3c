"""Fetching released weights: a file takes its place only after it has been loaded as the network it should hold."""

import contextlib
import glob
import hashlib
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
    mark = hashlib.blake2b(str(source).encode(), digest_size=4).hexdigest()  # never continue with another source
    arrived = path.with_name(f".{path.name}.{mark}.arrived")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        continued = get(source, arrived)
        try:
            check(source, arrived, name)
        except UserError:
            if not continued:
                raise
            arrived.unlink()  # the file at the source has changed in between: once more, from the start
            get(source, arrived)
            check(source, arrived, name)
        os.replace(arrived, path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be used ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            arrived.unlink(missing_ok=True)


def get(source, path):
    """Downloads or copies -> whether an interrupted download was continued."""
    if "://" in str(source):
        return download(source, path)
    if not Path(source).is_file():
        raise UserError(f"{source} does not exist.")
    shutil.copyfile(source, path)
    return False


def check(source, path, name):
    """Raises UserError unless the file at `path`, which came from `source`, is whole and holds the network `name`."""
    with open(path, "rb") as file:
        start = file.read(4096).decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
    if re.match(r"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        title = re.search(r"<title>\s*(.*?)\s*</title>", start, re.IGNORECASE | re.DOTALL)
        raise UserError(f"{source} sent a web page instead of weights ({title[1] if title else 'untitled'}).")
    try:
        found = network_name(load_network(path))
    except UserError as error:
        raise UserError(f"{source} sent no checkpoint of a network: {sentence(error)}") from error
    if found != name:
        raise UserError(f"{source} holds {found}, not {name}.")


def download(url, path):
    """Downloads a file, also from Google Drive, continuing where an earlier call was cut off -> whether it did so."""
    try:
        import gdown
    except ImportError:
        raise UserError("downloads need gdown: pip install 'gdown>=6'.") from None

    def attempt():
        gdown.download(url, str(path), resume=True, retries=RETRIES, timeout=PATIENCE, use_cookies=False)

    def parts():
        return list(path.parent.glob(f"{glob.escape(path.name)}*.part"))

    continued = bool(parts()) or path.exists()
    try:
        try:
            attempt()
        except gdown.exceptions.DownloadError as error:
            if "byte range" not in str(error):
                raise
            for part in parts():  # this host cannot continue: from the start, then
                part.unlink()
            attempt()
    except (gdown.exceptions.DownloadError, OSError) as error:
        kept = sum(part.stat().st_size for part in parts())
        hint = f"; {kept / 2**20:.1f} MiB of it are kept, repeat the command to continue" if kept else ""
        reason = " ".join(str(error).partition("\nThe received bytes")[0].split())
        if unreachable := re.search(r"ConnectionPool\(host='([^']+)'", reason):
            reason = f"no connection to {unreachable[1]}"
        raise UserError(f"{url} could not be fetched ({reason.rstrip('.')}{hint}).") from error
    return continued
