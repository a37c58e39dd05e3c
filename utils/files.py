"""Writing files so that nothing half-written is ever left."""

import contextlib
import csv
import errno
import io
import json
import os
import zlib
from pathlib import Path

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR)


def short_name(name):
    """-> a name that stands for a file's, which can be as long as names may be, and leaves room for an ending."""
    return f"{name[:55]}.{zlib.crc32(os.fsencode(name)):08x}"  # names that begin alike are used at the same time


@contextlib.contextmanager
def atomic_path(path, previous=None):
    """Yields another name in the same folder for a file that takes the place of `path` when the block ends well, and
    vanishes when it does not.

    What it replaces is kept as `previous`, if that is given: one of the two is there at any time. Folders are made as
    needed. A full disk, a read-only folder and the like raise UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{short_name(path.name)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the disk says
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or cause
        raise UserError(f"{path} cannot be written ({reason}): free some space or choose another folder.") from cause
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Yields a binary file that takes the place of `path` as in atomic_path."""
    with atomic_path(path, previous) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def lock(path):
    """Locks a file, which is made if need be -> the open file, or None if another process has locked it.

    The lock ends when the file is closed or this process ends, in whatever way. Where the system or its file system
    has no locks, none is set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115
    try:
        if fcntl:  # not flock: data-loading processes would inherit its lock, and they outlive a killed run by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
    return file


def disk_failed(error):
    """Whether a UserError comes from a disk that takes no further file either."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_ERRORS


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # names that are not UTF-8, as they are


def write_csv(path, header, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def write_json(path, content):
    """Writes plain data; numbers that JSON does not know (infinite, not a number) raise ValueError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
