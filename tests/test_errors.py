import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.errors import UserError, reports_errors


def fail_with(error):
    raise error


@pytest.mark.parametrize(
    "fail, message",
    [
        (lambda: torch.empty(10**15), "memory is too small"),
        (lambda: bytearray(10**15), "memory is too small"),
        (lambda: fail_with(torch.OutOfMemoryError()), "memory is too small"),
        (lambda: Path("/nowhere/a.png").read_bytes(), "/nowhere/a.png cannot be used"),
        (lambda: fail_with(UserError("a.png is broken.")), "a.png is broken."),
    ],
)
def test_errors_that_a_user_can_mend_are_sentences(fail, message):
    with pytest.raises(SystemExit, match=message):
        reports_errors(fail)()


def test_a_reader_that_stops_early_is_no_error():
    code = "from utils.errors import reports_errors; reports_errors(lambda: print('line\\n' * 10**6))()"
    command = f'{sys.executable} -c "{code}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n", "")


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        reports_errors(lambda: fail_with(RuntimeError("a bug")))()
