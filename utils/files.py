"""Writing files so that nothing half-written is ever left."""

import contextlib
import csv
import errno
import io
import json
import os
from pathlib import Path

from utils.errors import UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Folders are made as needed. A full disk, a read-only folder and the like raise UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:60]}.tmp")  # a name can be as long as names may be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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


def disk_failed(error):
    """Whether a UserError comes from a disk that takes no further file either."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_ERRORS


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())


def write_csv(path, header, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def write_json(path, content):
    """Writes plain data; numbers that JSON does not know (infinite, not a number) raise ValueError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
