"""Files that are written whole or not at all, and errors that are sentences."""

import contextlib
import csv
import errno
import functools
import io
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy
import PIL

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".nerd-rain.tmp"  # the end of names of files that are being written
# The last two mean that the folder to write to is a file.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class UserError(Exception):
    """Something the user can mend; the message names the file or option and the way out."""


def counted(number, noun):
    """-> such as "1 picture" or "2 pictures"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(lines, most=20):
    """-> the first `most` lines, indented on lines of their own, and how many more there are."""
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


def out_of_memory(error):
    """Whether an error means that GPU or main memory is used up; for the latter PyTorch raises a plain RuntimeError."""
    gpu = type(error).__name__ == "OutOfMemoryError"  # PyTorch's
    return gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def reports_errors(main):
    """Decorates a script's main function: errors that a user can mend end it with a sentence instead of a traceback.
    Sets up printing and logging first."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        if isinstance(sys.stdout, io.TextIOWrapper):
            # For file names that are not UTF-8, and for those who watch a run through a file.
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("utils").setLevel(logging.INFO)
        # Silences library warnings about broken pictures: our sentences name those.
        set_log_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # OpenCV 4, 5
        set_log_level(0)
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module="PIL")
        try:
            return main(*args, **kwargs)
        except UserError as error:  # one from a data-loading process is wrapped in its traceback
            sys.exit(f"error: {str(error).rpartition('UserError: ')[2].strip()}")
        except BrokenPipeError:  # of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more
            sys.exit(1)
        except OSError as error:
            what = f"{error.filename} cannot be used" if error.filename else "a file cannot be read or written"
            sys.exit(f"error: {what} ({error.strerror or error}): check its path, its permissions and the free space.")
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            sys.exit("error: out of memory: choose a smaller patch, batch or window, or --mode tile instead of whole.")
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept.", file=sys.stderr)
            sys.exit(130)

    return wrapped


@functools.cache  # once per folder: listing a large one for every file would take long
def remove_abandoned(folder):
    """Removes what killed processes left in a folder: temporary files that nobody has written to for a day. Their
    processes' numbers would not tell, as containers have numbers of their own."""
    with contextlib.suppress(OSError):  # a folder that cannot be tidied may still be written to
        for path in folder.glob(f".*{TEMPORARY}"):
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path, previous=None):
    """Yields a temporary name beside `path`; the file written there replaces `path` if the block succeeds, and is
    removed if it fails.

    `previous` keeps the file that is replaced: one of the two exists at any time. Parent folders are created. A full
    disk, a read-only folder and the like raise UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:25]}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        yield temporary
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps the disk's error
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or cause
        raise UserError(f"{path} cannot be written ({reason}): free some space or choose another folder.") from cause
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Yields a binary file that replaces `path` as in atomic_path."""
    with atomic_path(path, previous) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def disk_failed(error):
    """Whether a UserError comes from a disk on which no other file can be written either."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_ERRORS


def lock(path):
    """Locks a file, created if needed -> the open file, or None if another process holds the lock.

    Closing the file or ending the process, in whatever way, releases the lock. File systems without locks set none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115
    try:
        if fcntl:  # not flock: data-loading workers would inherit its lock, and they outlive a killed run by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
    return file


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # keeps file names that are not UTF-8


def write_csv(path, header, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def write_json(path, content):
    """Writes plain data as JSON; infinite numbers and NaN raise ValueError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_json(path, content):
    """Adds a line of JSON to a file. Raises OSError if it cannot be written."""
    with open(path, "a") as file:
        file.write(f"{json.dumps(content)}\n")


def write_json_lines(path, lines):
    """Writes a list as lines of JSON, which read_json_lines reads."""
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def read_json_lines(path):
    """-> list of what a file of JSON lines holds, without lines that a power failure cut off; [] without the file."""
    found = []
    if not path.is_file():
        return found
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def software():
    """-> dict of the versions that results depend on, and of this repository's commit (None outside a clone)."""
    import torch  # takes seconds, and many who write files do without
    import torchvision

    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    modules = {"torch": torch, "torchvision": torchvision, "numpy": numpy, "opencv": cv2, "pillow": PIL}
    versions = {name: module.__version__ for name, module in modules.items()}
    return {"commit": commit or None, "python": platform.python_version(), **versions}
