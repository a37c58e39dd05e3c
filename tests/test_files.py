import csv
import errno
import inspect
import io
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from utils import files
from utils.files import (
    UserError,
    append_json,
    atomic_path,
    atomic_write,
    counted,
    disk_failed,
    listed,
    lock,
    out_of_memory,
    read_json_lines,
    reports_errors,
    sentence,
    short_name,
    software,
    write_csv,
    write_json,
    write_text,
)

ROOT = Path(__file__).parent.parent


def fail(error):
    raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def python(code, *arguments):
    """A Python process in the repository that is running the code, with pipes."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_file_appears_whole_in_new_folders_and_keeps_what_it_replaces(tmp_path):
    path, previous = tmp_path / "new" / "folder" / "a.txt", tmp_path / "new" / "folder" / "b.txt"
    for content in (b"one", b"two", b"three"):
        with atomic_write(path, previous) as file:
            file.write(content)
            assert len(names(path.parent)) == 1 + path.exists() + previous.exists()
    assert names(path.parent) == ["a.txt", "b.txt"]
    assert path.read_bytes() == b"three" and previous.read_bytes() == b"two"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), UserError("a.png is broken")])
def test_a_failed_block_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a", tmp_path / "previous") as file:
        file.write(b"half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file on a disk that takes a few bytes more."""

    def write(self, data):
        return no_space() if self.tell() + len(data) > 1000 else super().write(data)


def write_tensor(path):
    with atomic_write(path) as file:
        torch.save(torch.zeros(10_000), file)


@pytest.mark.parametrize("write", [write_tensor, lambda path: write_text(path, "x" * 2000)], ids=["tensor", "text"])
@pytest.mark.parametrize(
    "module, name, fault",
    [
        (files, "open", FullDisk),
        (os, "fsync", no_space),
        (os, "replace", no_space),
        (Path, "mkdir", no_space),
    ],
)
def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, write, module, name, fault):
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(module, name, fault, raising=False)
    message = rf"{path} cannot be written \(No space left on device\): free some space"
    with pytest.raises(UserError, match=message) as caught:
        write(path)
    assert disk_failed(caught.value)
    assert names(tmp_path) == ["a"] and path.read_text() == "old"


def test_only_errors_of_the_disk_concern_other_files(tmp_path):
    (tmp_path / "file").touch()
    for name, of_disk in (("file/a", True), ("file/folder/a", True), ("", False)):  # "" is a folder
        with pytest.raises(UserError, match="cannot be written") as caught, atomic_write(tmp_path / name):
            pass
        assert disk_failed(caught.value) == of_disk
    assert not disk_failed(UserError("a.png is broken"))


def test_temporary_names_contain_host_process_and_thread_and_fit_however_long_the_name(tmp_path, monkeypatch):
    found = []

    def write(path):
        with atomic_path(path) as temporary:
            temporary.touch()
            found.append(temporary.name)

    for name in ("x" * 255, "x" * 254 + "y", "雨" * 85, "a.png"):
        write(tmp_path / name)
    with ThreadPoolExecutor() as pool:
        pool.submit(write, tmp_path / "a.png").result()
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(os, "getpid", lambda: 4194304)
    write(tmp_path / ("雨" * 85))
    assert len(set(found)) == len(found) and all(len(os.fsencode(name)) < 255 for name in found)
    assert f".{'h' * 64}-4194304-{threading.get_native_id()}.tmp" in found[-1]
    assert found[3].startswith(f".{short_name('a.png')}.") and len(names(tmp_path)) == 4


WRITER = """
import sys
from pathlib import Path
from utils.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_killed_writers_left_is_removed_but_not_what_living_ones_write(tmp_path):
    killed, living = (python(WRITER, tmp_path / name) for name in ("a", "b"))
    for writer in (killed, living):
        assert writer.stdout.readline() == "writing\n"
    killed.kill()
    killed.communicate()
    foreign = f".x.00000000.another-machine-{killed.pid}-1.tmp"
    for name in (foreign, ".x.tmp", ".x.00000000.-1.tmp"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    write_text(tmp_path / "c", "whole")
    (removed,) = set(before) - set(names(tmp_path))
    assert removed.startswith(".a.") and (tmp_path / foreign).exists()
    living.communicate("")
    assert living.returncode == 0 and (tmp_path / "b").read_bytes() == b"half"


def write_often(path, letter):
    for number in range(30):
        write_text(path, letter * (1000 + number))


def test_several_writers_of_one_file_never_give_torn_reads(tmp_path):
    path = tmp_path / "a"
    write_text(path, "x" * 1000)
    code = (
        f"import sys\n{inspect.getsource(write_often)}\nfrom utils.files import write_text\nwrite_often(*sys.argv[1:])"
    )
    processes = [python(code, path, letter) for letter in "ab"]
    with ThreadPoolExecutor() as pool:
        threads = [pool.submit(write_often, path, letter) for letter in "cd"]
        while any(process.poll() is None for process in processes) or not all(thread.done() for thread in threads):
            text = path.read_text()
            assert len(set(text)) == 1 and len(text) >= 1000
    assert [thread.result() for thread in threads] == [None, None]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert names(tmp_path) == ["a"] and len(path.read_text()) == 1029


LOCKER = """
import sys
from pathlib import Path
from utils.files import lock
file = lock(Path(sys.argv[1]))
print(file is not None, flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    path = tmp_path / "new" / "lock"
    holder = python(LOCKER, path)
    assert holder.stdout.readline() == "True\n"
    assert lock(path) is None
    holder.kill()
    holder.communicate()
    file = lock(path)
    other = python(LOCKER, path)
    assert file is not None and other.communicate("")[0] == "False\n"
    file.close()
    assert python(LOCKER, path).communicate("")[0] == "True\n"


def test_file_systems_without_locks_set_none(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "lockf", lambda *arguments: fail(OSError(errno.ENOLCK, "No locks available")))
    assert lock(tmp_path / "lock") is not None
    monkeypatch.setattr(files, "fcntl", None)  # Windows
    assert lock(tmp_path / "lock") is not None


def test_tables_and_json_keep_what_they_are_given(tmp_path):
    rows = [['雨, "é"\n', 1], [os.fsdecode(b"\xff.png"), 2.5]]
    write_csv(tmp_path / "a.csv", ["name", "value"], rows)
    with open(tmp_path / "a.csv", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [["name", "value"], *([name, str(value)] for name, value in rows)]
    write_json(tmp_path / "a.json", {"雨": [1, 2.5, None]})
    assert read_json_lines(tmp_path / "a.json") == []
    assert '"雨": [' in (tmp_path / "a.json").read_text(encoding="utf-8")
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "b.json", {"loss": number})
    assert names(tmp_path) == ["a.csv", "a.json"]


def test_lines_of_json_are_read_without_those_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_json_lines(path) == []
    for epoch in (1, 2):
        append_json(path, {"epoch": epoch})
    with open(path, "ab") as file:
        file.write(b'[3]\n\xff\n\n{"epoch": 4')
    assert read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]
    with pytest.raises(UserError, match=r"log.jsonl cannot be written .Not a directory"):
        append_json(path / "log.jsonl", {})


def test_numbers_and_lists_read_well():
    assert [counted(number, "picture") for number in (0, 1, 12345)] == ["0 pictures", "1 picture", "12,345 pictures"]
    assert listed([]) == "" and listed(["a", "b"], most=2) == "\n  a\n  b"
    assert listed(list("abcd"), most=2) == "\n  a\n  b\n  … and 2 more"
    worker = UserError("Caught UserError in worker 0.\nTraceback …\nutils.files.UserError: a.png is broken.\n")
    assert sentence(worker) == sentence(UserError("a.png is broken.")) == "a.png is broken."


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: fail(UserError("a.png is broken.")), r"^error: a\.png is broken\.$"),
        (lambda: Path("/nowhere/a.png").read_bytes(), r"error: /nowhere/a\.png cannot be used \(No such file or dir"),
        (lambda: fail(OSError("no device")), r"error: a file cannot be read or written \(no device\): check its path"),
        (lambda: no_space(), r"error: a file cannot be read or written \(No space left on device\)"),
        (lambda: torch.empty(10**15), "error: out of memory: choose a smaller patch"),
        (lambda: bytearray(10**15), "error: out of memory"),
        (lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), "error: out of memory"),
    ],
)
def test_errors_that_a_user_can_mend_are_sentences(function, message):
    with pytest.raises(SystemExit, match=message):
        reports_errors(function)()


def test_other_errors_keep_their_traceback_and_results_are_passed_on():
    with pytest.raises(RuntimeError, match="a bug"):
        reports_errors(lambda: fail(RuntimeError("a bug")))()
    assert not out_of_memory(RuntimeError("a bug"))
    assert reports_errors(lambda x, y=0: x + y)(1, y=2) == 3


def test_ctrl_c_says_what_is_kept(capsys):
    with pytest.raises(SystemExit) as caught:
        reports_errors(lambda: fail(KeyboardInterrupt()))()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted; what was finished is kept.\n"


def test_a_reader_that_stops_early_is_no_error():
    process = python("from utils.files import reports_errors; reports_errors(lambda: print('line\\n' * 10**6))()")
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_names_that_are_not_utf8_can_be_printed():
    code = "import os; from utils.files import reports_errors; reports_errors(lambda: print(os.fsdecode(b'\\xff')))()"
    assert python(code).communicate() == ("\\udcff\n", "")


def test_pytorch_is_not_imported_by_those_who_only_write_files():
    assert python("import sys, utils.files; print('torch' in sys.modules)").communicate()[0] == "False\n"


def test_software_is_what_runs(monkeypatch):
    versions = software()
    assert versions["torch"] == torch.__version__ and versions["python"] == sys.version.split()[0]
    assert versions.keys() == {"commit", "python", "torch", "torchvision", "numpy", "opencv", "pillow"}
    monkeypatch.setenv("PATH", "")
    assert software() == {**versions, "commit": None}
