"""Errors that a user can mend are sentences, not tracebacks."""

import functools
import io
import logging
import os
import sys
import warnings

import cv2
import torch


class UserError(Exception):
    """Something is wrong with what the user gave; the message names it and says what to do."""


def sentence(error):
    """The message of a UserError. One raised in a data-loader worker arrives wrapped in its traceback."""
    return str(error).rpartition("UserError: ")[2].strip()


def counted(number, noun):
    """-> such as "1 picture" or "2 pictures"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(problems, most):
    """-> the first `most` sentences, each on a line of its own, and how many more there are."""
    more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {problem}" for problem in [*problems[:most], *more])


def out_of_memory(error):
    """Whether an error says that a GPU's memory is used up, or the main memory, for which PyTorch has no error."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def quiet_decoders():
    """Keeps to themselves what libraries say on the side about broken picture files: our sentences name those."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    for library in ("tifffile", "pyvips"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="PIL")


def reports_errors(main):
    """Makes a script's main function end with a sentence, not a traceback, on errors that a user can mend, and shows
    what our modules log."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files, which stderr shows so anyway
        logging.basicConfig(format="%(message)s")
        logging.getLogger("utils").setLevel(logging.INFO)
        quiet_decoders()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.exit(f"error: {sentence(error)}")
        except BrokenPipeError:  # of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it ends
            sys.exit(1)
        except OSError as error:
            sys.exit(
                f"error: {error.filename or 'a file'} cannot be used ({error.strerror or error}): check path and space."
            )
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            sys.exit(
                "error: the memory is too small for this: choose a smaller patch, batch or window, or --mode tile "
                "instead of whole."
            )
        except KeyboardInterrupt:
            print("interrupted: what was finished is kept.", file=sys.stderr)
            sys.exit(130)

    return wrapped
