import csv
import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from utils import files
from utils.files import UserError, atomic_path, atomic_write, disk_failed, lock, reports_errors, write_text


def fail(error):
    raise error


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_python(code, *arguments):
    command, pipe = [sys.executable, "-c", code, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_a_file_appears_whole_in_new_folders_and_keeps_what_it_replaces(tmp_path):
    path, previous = tmp_path / "new" / "folder" / "a.txt", tmp_path / "new" / "folder" / "b.txt"
    for content in (b"one", b"two", b"three"):
        with atomic_write(path, previous) as file:
            file.write(content)
            assert len(names(path.parent)) == 1 + path.exists() + previous.exists()
    assert names(path.parent) == ["a.txt", "b.txt"]
    assert path.read_bytes() == b"three" and previous.read_bytes() == b"two"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UserError])
def test_a_failed_block_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic_write(tmp_path / "a", tmp_path / "previous") as file:
        file.write(b"half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


class FullDisk(io.FileIO):
    """A file on a disk that takes a few bytes more."""

    def write(self, data):
        return no_space() if self.tell() + len(data) > 1000 else super().write(data)


@pytest.mark.parametrize(
    "module, name, fault", [(files, "open", FullDisk), (os, "fsync", no_space), (os, "replace", no_space)]
)
def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, module, name, fault):
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(module, name, fault, raising=False)
    message = r"a cannot be written \(No space left on device\): free some space"
    for write in (lambda file: file.write(b"x" * 2000), lambda file: torch.save(torch.zeros(10_000), file)):
        with pytest.raises(UserError, match=message) as caught, atomic_write(path) as file:
            write(file)
        assert disk_failed(caught.value) and names(tmp_path) == ["a"] and path.read_text() == "old"


def test_temporary_names_differ_and_fit_however_long_the_name(tmp_path):
    temporary_names = []
    for name in ("x" * 255, "x" * 254 + "y", "雨" * 85, "a.png", "a.png"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.touch()
            temporary_names.append(temporary.name)
    assert len(set(temporary_names)) == 5 and max(len(os.fsencode(name)) for name in temporary_names) < 255


def test_what_killed_writers_left_is_removed_after_a_day_but_not_what_living_ones_write(tmp_path):
    with atomic_path(tmp_path / "a") as living:
        killed = living.with_name(f".x{living.name}")
        for path, age in ((living, 3600), (killed, 90000), (tmp_path / ".x.tmp", 90000), (tmp_path / "b.tmp", 90000)):
            path.touch()
            os.utime(path, (time.time() - age, time.time() - age))
        files.remove_abandoned.cache_clear()
        write_text(tmp_path / "c", "whole")
        assert living.exists() and not killed.exists()
    assert names(tmp_path) == [".x.tmp", "a", "b.tmp", "c"]


def test_one_process_at_a_time_holds_a_lock_where_there_are_locks(tmp_path, monkeypatch):
    path = tmp_path / "new" / "lock"
    code = "import pathlib, sys, utils.files; print(utils.files.lock(pathlib.Path(sys.argv[1])) is None)"
    with lock(path):
        assert start_python(code, path).communicate()[0] == "True\n"
    assert start_python(code, path).communicate()[0] == "False\n"
    monkeypatch.setattr(files.fcntl, "lockf", lambda *arguments: fail(OSError(errno.ENOLCK, "No locks available")))
    assert lock(path)


def test_tables_and_json_keep_what_they_are_given(tmp_path):
    rows = [['雨, "é"\n', "1"], [os.fsdecode(b"\xff.png"), "2.5"]]
    files.write_csv(tmp_path / "a.csv", ["name", "value"], rows)
    with open(tmp_path / "a.csv", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [["name", "value"], *rows]
    files.write_json(tmp_path / "a.json", {"雨": [1, 2.5, None]})
    assert '"雨": [' in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert names(tmp_path) == ["a.csv", "a.json"]


def test_lines_of_json_are_read_without_those_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_json_lines(path) == []
    for epoch in (1, 2):
        files.append_json(path, {"epoch": epoch})
    with open(path, "ab") as file:
        file.write(b'\xff\n\n{"epoch": 4')
    assert files.read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: fail(UserError("a.png is broken.")), r"^error: a\.png is broken\.$"),
        (lambda: Path("/nowhere/a.png").read_bytes(), r"error: /nowhere/a\.png cannot be used \(No such file or dir"),
        (no_space, r"error: a file cannot be read or written \(No space left on device\): check its path"),
        (lambda: torch.empty(10**15), "error: out of memory: choose a smaller patch"),
        (lambda: bytearray(10**15), "error: out of memory"),
        (lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), "error: out of memory"),
        (lambda: fail(KeyboardInterrupt()), "^130$"),
    ],
)
def test_errors_that_a_user_can_fix_are_sentences_and_others_keep_their_traceback(function, message):
    with pytest.raises(SystemExit, match=message):
        reports_errors(function)()
    with pytest.raises(RuntimeError, match="a bug"):
        reports_errors(lambda: fail(RuntimeError("a bug")))()


def test_output_may_end_early():
    process = start_python("from utils.files import reports_errors; reports_errors(lambda: print('line\\n' * 10**6))()")
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait() == 1
