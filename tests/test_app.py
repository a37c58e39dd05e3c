import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import test as script
from tests.conftest import make_pairs
from utils.checkpoint import OWN_WEIGHTS
from utils.images import write_png

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -r requirements-app.txt")
import app  # noqa: E402 (it needs Gradio)

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def write_zip(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def png(tmp_path):
    """The bytes of a small picture."""
    write_png(tmp_path / "source.png", noise(40, 56))
    return (tmp_path / "source.png").read_bytes()


@pytest.fixture
def derain(tmp_path, narrow_weights):
    """Derains uploads with a narrow network -> names of the results, the pair that is shown, problems."""

    def run(*uploads, mode=None, megapixels=1, watch=lambda done, total: None):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        results, pair, problems = app.derain_uploads(
            *([str(path) for path in uploads], work, narrow_weights, CPU, mode, megapixels, watch)
        )
        return [str(path.relative_to(work / "results")) for path in results], pair, problems

    return run


@pytest.fixture
def handler(tmp_path, narrow_weights, monkeypatch):
    """What the page's button does: uploads -> what it shows. All that it writes lies below handled/."""
    (tmp_path / "handled").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "handled"))

    def run(*uploads, seconds=60, stopped=False):
        page = app.build(CPU, {"narrow": narrow_weights}, 1, seconds, {})
        functions = {event.name: event.fn for event in page.fns.values()}
        request = SimpleNamespace(session_hash="a")
        assert functions["enlist"](request)[2]["interactive"] is False  # an earlier result
        if stopped:
            assert "when its turn comes" in functions["stop_work"](request)
        shows = functions["derain"](list(map(str, uploads)), "narrow", app.AUTOMATIC, request)
        slider, video, download, status = next(shows)
        copy = Path(shutil.copy(download["value"], tmp_path / "downloaded"))
        assert not list(shows)
        return slider["visible"], video["visible"], download["label"], copy, status

    return run


def test_results_are_the_files_of_test_py(derain, tmp_path, narrow_weights):
    folder = tmp_path / "photos"
    write_png(folder / "a.png", noise(40, 56))
    Image.fromarray(noise(260, 40)).save(folder / "b.jpg")
    (folder / "sub").mkdir()
    Image.fromarray(noise(40, 40)[..., 0].astype(np.uint16) * 257).save(folder / "sub" / "c.png")
    (folder / "notes.txt").write_text("no picture")
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", folder))
    for mode in (None, "tile"):
        options = ["--mode", mode] if mode else []
        expected = tmp_path / f"expected_{mode}"
        script.main(
            [*("--input_dir", str(folder), "--output_dir", str(expected), "--weights", str(narrow_weights)), *options]
        )
        for uploads in ([archive], [folder / "a.png", folder / "b.jpg"]):
            names, pair, problems = derain(*uploads, mode=mode)
            assert names == ["a.png", "b.png", "sub/c.png"][: len(names)] and len(names) > 1
            for name in names:
                assert (tmp_path / "work" / "results" / name).read_bytes() == (expected / name).read_bytes()
            assert pair[0].name == pair[1].name == "a.png"
            assert problems == (["notes.txt is not named like a picture: it was left out."] if len(names) == 3 else [])


def test_what_cannot_be_done_does_not_lose_the_others(derain, tmp_path, png):
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    (tmp_path / "broken.zip").write_bytes(b"broken")
    write_png(tmp_path / "large.png", noise(1001, 1000))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png)
    uploads = [tmp_path / name for name in ("a.png", "broken.jpg", "broken.zip", "large.png", "sub/a.png")]
    names, _, problems = derain(*uploads)
    assert names == ["a.png"]
    text = "\n".join(problems)
    assert "broken.jpg cannot be read as a picture" in text and "broken.zip cannot be read as a zip file" in text
    assert "large.png has more than 1 megapixels" in text and "could both become a.png: rename one" in text
    assert len(problems) == 4 and str(tmp_path) not in text


def test_zip_files_stay_in_their_folder(derain, tmp_path, png):
    archive = write_zip(
        tmp_path / "hostile.zip",
        **{"../../up.png": png, "/root.png": png, "C:\\drive.png": png, "a/b/c.png": png, ".hidden.png": png},
        **{"x" * 300 + ".png": png, "a.png/inside.png": png, "a.png": png},
    )
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, str(OWN_WEIGHTS))
    before = set(tmp_path.rglob("*"))
    names, _, problems = derain(archive)
    assert {"up.png", "root.png", "a/b/c.png", "a.png/inside.png"} <= set(names)
    assert all(path in before or tmp_path / "work" in path.parents for path in tmp_path.rglob("*") if path.is_file())
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    assert any(".hidden.png is not named like a picture" in problem for problem in problems)
    assert any("link.png cannot be read as a picture" in problem for problem in problems)
    assert any("xxx.png cannot be unpacked" in problem for problem in problems)


def test_zip_bombs_are_refused_unopened(derain, tmp_path, png, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(3 * 2**20))
    many = write_zip(tmp_path / "many.zip", **{f"{number}.txt": b"" for number in range(5)})
    monkeypatch.setattr(app, "ZIP_MB", 2)
    monkeypatch.setattr(app, "ZIP_FILES", 4)
    for path, found in ((tmp_path / "bomb.zip", "holds 1 files, unpacked 3 MB"), (many, "holds 5 files")):
        names, _, problems = derain(path)
        assert not names and found in problems[0] and "split it" in problems[0]
        assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    size = (3 * 2**20).to_bytes(4, "little")
    lying = (tmp_path / "bomb.zip").read_bytes().replace(size, (100).to_bytes(4, "little"))
    (tmp_path / "lying.zip").write_bytes(lying)
    _, _, problems = derain(tmp_path / "lying.zip")
    assert "zeros.png cannot be unpacked" in problems[0]
    assert all(path.stat().st_size <= 100 for path in (tmp_path / "work").rglob("*") if path.is_file())


def test_large_pictures_are_refused_and_whole_ones_have_their_own_limit(derain, tmp_path):
    write_png(tmp_path / "a.png", noise(1100, 1000))
    options = {"photometric": "minisblack", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((1100, 1000, 2), np.uint16), **options)  # which Pillow cannot open
    for name in ("a.png", "a.tif"):
        assert "more than 1 megapixels" in derain(tmp_path / name)[2][0]
        assert "choose another mode" in derain(tmp_path / name, mode="whole", megapixels=2)[2][0]


@pytest.mark.parametrize("kind", ["pictures", "windows"])
def test_work_is_stopped_and_what_is_done_kept(derain, tmp_path, kind):
    count, size = (5, (40, 56)) if kind == "pictures" else (2, (600, 300))  # of one or six windows
    make_pairs(tmp_path / "pairs", count, size)
    seen = []

    def watch(done, total):
        seen.append(done)
        if len(seen) == 5:
            raise app.Stopped("Stopped.")

    names, pair, problems = derain(*sorted((tmp_path / "pairs" / "input").iterdir()), watch=watch)
    assert problems == ["Stopped."] and len(seen) == 5
    if kind == "pictures":
        assert seen == [0, 1, 2, 3, 4] and names[:1] == ["0.png"] and len(names) < 5
    else:
        assert np.allclose(seen, np.arange(5) / 6) and not names and not pair


def test_clips_are_derained_within_the_limits(derain, tmp_path, narrow_weights):
    pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-extras.txt")
    from tests.test_video import arrays, pictures, write_clip

    clip = write_clip(tmp_path / "clip.mp4", pictures(4))
    options = ["--output_dir", str(tmp_path / "expected"), "--weights", str(narrow_weights)]
    script.main(["--input_dir", str(clip), *options])
    seen = []
    names, pair, problems = derain(clip, watch=lambda done, total: seen.append((done, total)))
    assert (names, pair, problems) == (["clip.mp4"], None, []) and seen == [(number, 4) for number in range(4)]
    again = arrays(tmp_path / "work" / "results" / "clip.mp4")
    assert np.array_equal(again, arrays(tmp_path / "expected" / "clip.mp4"))

    def stop(done, total):
        if done == 2:
            raise app.Stopped("Stopped.")

    assert derain(clip, watch=stop) == ([], None, ["Stopped."])
    assert not list((tmp_path / "work" / "results").rglob("*"))
    write_clip(tmp_path / "large.mp4", pictures(1, 1024, 1024))
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    names, _, problems = derain(tmp_path / "large.mp4", tmp_path / "broken.mp4")
    assert not names and problems[0].startswith("large.mp4 has frames of more than 1 megapixels")
    assert problems[1].startswith("broken.mp4 cannot be read as a video")


def test_the_page_shows_results_and_problems_and_keeps_no_files(handler, tmp_path, png):
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "<b>.png").write_bytes(b"broken")
    *shown, _, status = handler(tmp_path / "a.png", tmp_path / "<b>.png")
    assert shown == [True, False, "Download a.png"]
    assert status.startswith("a.png is done") and "<b>.png cannot be read" in status
    *shown, copy, status = handler(write_zip(tmp_path / "two.zip", **{"a.png": png, "sub/b.png": png}))
    assert shown == [True, False, "Download derained.zip"] and status.startswith("2 done")
    assert {"a.png", "sub/b.png"} <= set(zipfile.ZipFile(copy).namelist())
    for uploads, message in (
        ([], "choose pictures"),
        ([tmp_path / "<b>.png"], "Nothing was derained.*&lt;b&gt;.png cannot be read"),
        ([tmp_path / "gone.png"], "gone.png has been deleted meanwhile"),
    ):
        with pytest.raises(gr.Error, match=f"(?s){message}"):
            handler(*uploads)
    with pytest.raises(gr.Error, match="time limit of -1 seconds"):
        handler(tmp_path / "a.png", seconds=-1)
    with pytest.raises(gr.Error, match="Stopped before it began"):
        handler(tmp_path / "a.png", stopped=True)
    assert not [path for path in (tmp_path / "handled").iterdir() if path.name != "gradio"]


def test_uploads_are_deleted_and_no_other_files_served(tmp_path, monkeypatch, png):
    httpx = pytest.importorskip("httpx")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(app, "KEPT", 2)
    monkeypatch.setattr(app, "SWEEP", 1)
    page = app.build(CPU, {"narrow": OWN_WEIGHTS}, 1, 0.1, {})
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        path = Path(httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", png)}).json()[0])
        assert tmp_path in path.parents
        assert httpx.get(f"{url}gradio_api/file={path}").content == png
        for other in (ROOT / "app.py", tmp_path / "source.png"):
            assert httpx.get(f"{url}gradio_api/file={other}").status_code == 403
        for _ in range(100):
            if not path.exists():
                break
            time.sleep(0.1)
        assert not path.exists()
    finally:
        page.close()


def test_uploads_that_broke_off_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "SWEEP", 0.1)
    (tmp_path / "gradio" / "abc").mkdir(parents=True)
    fragment, going_on, upload = (tmp_path / "gradio" / name for name in ("tmp1", "tmp2", "abc/tmp3.png"))
    for path in (fragment, going_on, upload):
        path.touch()
    for path in (fragment, upload):
        os.utime(path, (0, 0))
    threading.Thread(target=app.sweep_fragments, args=(tmp_path, 100), daemon=True).start()
    for _ in range(100):
        if not fragment.exists():
            break
        time.sleep(0.1)
    assert not fragment.exists() and going_on.exists() and upload.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there are no such signals here")
def test_a_closed_terminal_leaves_no_files(tmp_path, narrow_weights, png):
    """Also where Gradio is told to keep its files elsewhere. A proxy is not asked for the page."""
    httpx = pytest.importorskip("httpx")
    folders = {"TMPDIR": tmp_path / "served", "GRADIO_TEMP_DIR": tmp_path / "elsewhere"}
    for folder in folders.values():
        folder.mkdir()
    env = os.environ | {name: str(folder) for name, folder in folders.items()} | {"http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "app.py", "--gpus", "cpu", "--weights", narrow_weights]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[0]
            with httpx.Client(trust_env=False) as client:
                client.post(f"{url}gradio_api/upload", files={"files": ("a.png", png)})
            files = [path.read_bytes() for path in tmp_path.rglob("a.png")]
            assert files == [png]
            process.send_signal(signal.SIGHUP)
            assert process.wait(120) == 0
        finally:
            process.kill()
    assert not [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()]


def test_weights_are_chosen_from_a_list(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    (folder / "models" / "mine").mkdir(parents=True)
    own, mine = folder / "nerd_rain_s.pth", folder / "models" / "mine" / "model_best.pth"
    own.touch()
    mine.touch()
    monkeypatch.setattr(app, "OWN_WEIGHTS", own)
    assert list(app.find_weights(own).items()) == [(app.OWN, own), ("models/mine/model_best.pth", mine)]
    assert list(app.find_weights(mine).items()) == [("models/mine/model_best.pth", mine), (app.OWN, own)]
    elsewhere = tmp_path / "else.pth"
    assert next(iter(app.find_weights(elsewhere).items())) == (str(elsewhere), elsewhere)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--gpus", "99"], "--gpus 99"),
        (["--host", "::1"], "--host ::1: Gradio takes no IPv6 addresses"),
        (["--host", "203.0.113.7"], r"203\.0\.113\.7 cannot be used"),
        (["--port", "TAKEN"], r"127\.0\.0\.1:\d+ cannot be used"),
    ],
)
def test_errors_at_the_start_are_sentences(options, message, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("tempfile.tempdir", None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match=message):
        app.main([option.replace("TAKEN", str(taken.getsockname()[1])) for option in options])


def test_a_port_that_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit):
        app.main(["--port", "99999"])
    assert "--port must lie between 1 and 65535" in capsys.readouterr().err


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['gradio'] = None; import app"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "pip install -r requirements-app.txt" in result.stderr


@pytest.fixture
def server(tmp_path, narrow_weights):
    """The address of the app in a process of its own, whose temporary files lie below served/."""
    (tmp_path / "served").mkdir()
    command = [sys.executable, "app.py", "--gpus", "cpu", "--weights", narrow_weights, "--max_megapixels", "1"]
    env = {**os.environ, "TMPDIR": str(tmp_path / "served")}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[0]
            process.terminate()
            assert process.wait(120) == 0
            assert not [path for path in (tmp_path / "served").rglob("*") if path.is_file()]
        finally:
            process.kill()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="it needs playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")
    options = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


class Visitor:
    """Somebody with a browser of their own at the page; `elsewhere` lists the addresses it asked beside the app's."""

    def __init__(self, browser, url):
        self.page, self.elsewhere = browser.new_context().new_page(), []
        self.page.set_default_timeout(120_000)
        self.page.on("request", lambda request: request.url.startswith(url) or self.elsewhere.append(request.url))
        self.page.goto(url)

    def upload(self, *paths):
        """Chooses files instead of those chosen before."""
        clear = self.page.get_by_label("Clear").first
        if clear.is_visible():
            clear.click()
        self.page.locator("input[type=file]").first.set_input_files(paths)

    def derain(self, *paths):
        self.upload(*paths)
        self.page.get_by_text(paths[0].stem, exact=True).wait_for()
        self.page.get_by_role("button", name="Derain", exact=True).click()

    def download(self, name, folder):
        """Waits for a result and downloads it -> its path."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=f"Download {name}", exact=True).click()
        folder.mkdir(exist_ok=True)
        download.value.save_as(folder / download.value.suggested_filename)
        return folder / download.value.suggested_filename


@pytest.mark.slow
def test_visitors_with_browsers(browser, server, tmp_path, narrow_weights):
    uploads, expected, downloads = tmp_path / "uploads", tmp_path / "expected", tmp_path / "downloads"
    write_png(uploads / "a.png", noise(300, 400, seed=1))
    write_png(uploads / "b.png", noise(300, 400, seed=2))
    script.main(["--input_dir", str(uploads), "--output_dir", str(expected), "--weights", str(narrow_weights)])
    write_png(uploads / "large.png", noise(1000, 1001))
    (uploads / "broken.png").write_bytes(b"broken")
    first, second = Visitor(browser, server), Visitor(browser, server)

    for name, message in (("broken", "broken.png cannot be read as a picture"), ("large", "more than 1 megapixels")):
        first.derain(uploads / f"{name}.png")
        first.page.get_by_text(message).wait_for()
    first.derain(uploads / "a.png")  # at the same time
    second.derain(uploads / "b.png")
    for visitor, name in ((first, "a.png"), (second, "b.png")):
        assert visitor.download(name, downloads).read_bytes() == (expected / name).read_bytes()

    write_png(tmp_path / "flat.png", np.zeros((300, 400, 3), np.uint8))
    content = (tmp_path / "flat.png").read_bytes()
    first.derain(write_zip(tmp_path / "few.zip", **{f"sub/{number}.png": content for number in range(3)}))
    with zipfile.ZipFile(first.download("derained.zip", downloads)) as file:
        assert {f"sub/{number}.png" for number in range(3)} <= set(file.namelist())

    first.derain(write_zip(tmp_path / "many.zip", **{f"{number}.png": content for number in range(1000)}))
    first.page.get_by_text("of 1000").wait_for()
    second.derain(uploads / "a.png")
    first.page.close()  # which ends its work
    second.page.set_default_timeout(60_000)
    assert second.download("a.png", downloads).read_bytes() == (expected / "a.png").read_bytes()
    assert not first.elsewhere and not second.elsewhere
