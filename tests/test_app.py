import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, make_pairs, random_picture, save_narrow
from utils import pictures
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import Derainer
from utils.pictures import read_image, read_picture, write_png

pytest.importorskip("gradio", reason="Gradio is not installed: pip install -r requirements-app.txt")
import gradio_client

import app

PICTURE = random_picture(40, 56)


def files_below(folder):
    """-> names of its files except for the examples; Gradio leaves empty ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return [path.name for path in files if path.name not in [example.name for example in app.EXAMPLES]]


@pytest.fixture
def derain(tmp_path, narrow_net):
    """Derains uploads to derained/ -> names of the results, and problems."""

    def run(*uploads, watch=lambda done, total: None):
        folder, derainer = tmp_path / "derained", Derainer(narrow_net)
        folder.mkdir()
        results, problems = app.derain_uploads(list(map(str, uploads)), folder, derainer, watch)
        assert sorted(files_below(folder)) == sorted(path.name for path in results.values())
        return [path.name for path in results.values()], problems

    return run


@pytest.fixture
def press(tmp_path, narrow_weights, monkeypatch):
    """What the button does: uploads -> what slider, video, file and status show; a copy of the file is made, as Gradio
    does it. Nothing is left in the temporary folder. Visitors press Stop while the weights are loaded."""
    (tmp_path / "handled").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "handled"))

    def run(*uploads, seconds=60, stopped_by=()):
        stops = {}
        page = app.build(torch.device("cpu"), {"narrow": narrow_weights}, seconds, stops)
        assert page.delete_cache == (60, 3600 + seconds)  # how often Gradio deletes files of which age
        functions = {event.name: event.fn for event in page.fns.values()}

        def load(path):
            for visitor in stopped_by:
                functions["stop"](SimpleNamespace(session_hash=visitor))
            return load_network(path)

        monkeypatch.setattr(app, "load_network", load)
        shows = functions["derain"](list(map(str, uploads)), "narrow", "tile", SimpleNamespace(session_hash="me"))
        slider, video, file, status = next(shows)
        copy = Path(shutil.copy(file, tmp_path / "downloaded")) if file else None
        assert not list(shows) and not files_below(tmp_path / "handled") and not stops
        return slider, video, copy, status

    return run


def test_what_cannot_be_done_is_named_and_does_not_lose_the_others(derain, narrow_net, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 10**6)
    for name in ("a.png", "sub/a.png"):
        write_png(tmp_path / name, PICTURE)
    Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257).save(tmp_path / "z.tif")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    write_png(tmp_path / "large.png", np.zeros((1000, 1001, 3), np.uint8))
    content = (tmp_path / "large.png").read_bytes()
    (tmp_path / "large.png").write_bytes(content[:100])  # decoding it would fail
    names, problems = derain(*[tmp_path / name for name in ("a.png", "broken.jpg", "large.png", "sub/a.png", "z.tif")])
    text = "\n".join(problems)
    assert names == ["a.png", "z.png"] and len(problems) == 3 and str(tmp_path) not in text
    assert "broken.jpg cannot be read as a picture" in text and "large.png has more than 1 megapixels" in text
    assert "a.png and another file would both become a.png: rename one" in text
    expected = Derainer(narrow_net)(PICTURE)
    assert np.array_equal(read_image(tmp_path / "derained" / "a.png"), expected)
    deep = read_picture(tmp_path / "derained" / "z.png")
    assert deep.grey and deep.pixels.dtype == np.uint16


@pytest.mark.parametrize("count, size", [(5, (40, 56)), (2, (600, 300))])  # pictures of one window, and of six
def test_work_is_stopped_and_what_is_done_is_kept(derain, tmp_path, count, size):
    make_pairs(tmp_path / "pairs", count, size)
    seen = []

    def watch(done, total):
        seen.append(done)
        if len(seen) == 4:
            raise app.Stopped("Stopped.")

    names = ["0.png", "1.png", "2.png"] if count == 5 else []
    assert derain(*sorted((tmp_path / "pairs" / "input").iterdir()), watch=watch) == (names, ["Stopped."])
    assert np.allclose(seen, np.arange(1, 5) / (1 if count == 5 else 6))


def test_clips_are_derained(derain, tmp_path):
    from tests.test_video import drifting_colours, write_clip  # which skips this test where PyAV is missing

    clip, seen = write_clip(tmp_path / "clip.mp4", drifting_colours(4)), []
    assert derain(clip, watch=lambda *progress: seen.append(progress)) == (["clip.mp4"], [])
    assert seen == [(number, 4) for number in range(1, 5)]


def test_the_page_shows_results_and_problems(press, tmp_path):
    write_png(tmp_path / "a.png", PICTURE)
    write_png(tmp_path / "b.png", PICTURE[::-1])
    (tmp_path / "broken.png").write_bytes(b"broken")
    slider, video, file, status = press(tmp_path / "a.png", tmp_path / "broken.png")
    before, after = slider["value"]
    assert before.size == after.size == (56, 40) and slider["visible"] and not video["visible"]
    assert read_image(file).shape == (40, 56, 3)
    assert status.startswith("1 file derained in ") and "broken.png cannot be read" in status
    slider, _, file, status = press(tmp_path / "b.png", tmp_path / "a.png")
    assert status.startswith("2 files derained in ") and sorted(zipfile.ZipFile(file).namelist()) == ["a.png", "b.png"]
    assert np.array_equal(slider["value"][0], PICTURE[::-1])
    slider, video, file, status = press()
    assert slider["visible"] and not slider["value"] and file is None and "Choose pictures or a clip first." in status


def test_the_time_limit_and_the_visitor_stop_the_work(press, tmp_path):
    write_png(tmp_path / "a.png", PICTURE)
    assert "Stopped at the time limit of -1 seconds" in press(tmp_path / "a.png", seconds=-1)[3]
    assert "Stopped before all was done." in press(tmp_path / "a.png", stopped_by=["me"])[3]
    assert "1 file derained" in press(tmp_path / "a.png", stopped_by=["somebody else"])[3]


@pytest.fixture
def server(tmp_path, narrow_weights):
    """The app in a process of its own, whose temporary files lie below served/ -> (process, address)."""
    (tmp_path / "served").mkdir()
    command = [sys.executable, "app.py", "--gpus", "cpu", "--weights", narrow_weights, "--max_megapixels", "1"]
    env = {**os.environ, "TMPDIR": str(tmp_path / "served"), "http_proxy": "http://127.0.0.1:9"}  # which is not asked
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        yield process, next(line for line in process.stdout if line.startswith("http")).split()[0]
        process.kill()


def test_the_app_serves_its_files_alone_and_ends_without_leaving_any(server, tmp_path, narrow_weights, monkeypatch):
    process, url = server
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_png(tmp_path / "a.png", PICTURE)
    for number in range(20):
        write_png(tmp_path / f"long{number}.png", np.zeros((1000, 1000, 3), np.uint8))
    page = gradio_client.client.httpx.get(url).text
    assert not re.search(r'(src|href)="(https?:)?//(?!127)', page), "the page loads something from elsewhere"
    client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path / "downloads"))
    chosen = os.path.relpath(narrow_weights, OWN_WEIGHTS.parent)
    uploads = [gradio_client.handle_file(path) for path in sorted(tmp_path.glob("*.png"))]
    slider, _, file, status = client.predict(uploads[:1], chosen, "tile", api_name="/derain")
    assert Path(file).name == "a.png" and status.startswith("1 file derained") and len(slider["value"]) == 2
    for path in ("app.py", "checkpoints/nerd_rain_s.pth", "Datasets/demo/test/target/chelsea.png"):
        response = gradio_client.client.httpx.get(f"{url}gradio_api/file={ROOT / path}")
        assert response.status_code == 403, path
    work = client.submit(uploads[1:], chosen, "tile", api_name="/derain")
    while not work.done() and not work.status().progress_data:
        time.sleep(0.01)
    assert not work.done() and files_below(tmp_path / "served")
    process.send_signal(signal.SIGTERM)  # while it computes
    assert process.wait(600) == 0
    assert not files_below(tmp_path / "served")


def test_weights_are_chosen_from_a_list(tmp_path, monkeypatch):
    own, mine = tmp_path / "checkpoints" / "own.pth", save_narrow(tmp_path / "checkpoints" / "models" / "mine.pth")
    monkeypatch.setattr(app, "OWN_WEIGHTS", own)
    assert list(app.find_weights(own).items()) == [("own.pth", own), ("models/mine.pth", mine)]
    assert list(app.find_weights(tmp_path / "other.pth")) == ["../other.pth", "own.pth", "models/mine.pth"]


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--weights", "nowhere.pth", "nowhere.pth does not exist"),
        ("--host", "203.0.113.7", r"203\.0\.113\.7 cannot be used"),
        ("--port", "taken", r"127\.0\.0\.1 cannot be used .*choose another --host or --port"),
        ("--port", "99999", "choose another --host or --port"),
    ],
)
def test_errors_at_the_start_are_sentences(option, value, message, monkeypatch):
    monkeypatch.setattr(app, "serve", pytest.fail)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match=message):
        app.main([option, str(taken.getsockname()[1]) if value == "taken" else value])
