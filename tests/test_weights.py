import http.server
import shutil
import sys
import threading

import pytest

import ablations
from tests.conftest import save_narrow
from utils import weights
from utils.checkpoint import save_checkpoint
from utils.files import UserError

pytestmark = pytest.mark.usefixtures("narrow_is_published")


@pytest.fixture
def mirror(tmp_path):
    """A folder that mirrors one file of released weights."""
    save_narrow(tmp_path / "mirror" / "NeRD-Rain-S" / "Rain200L.pth")
    return str(tmp_path / "mirror")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        content, start = self.server.content, int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if content is None:
            return self.send_error(404)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : self.server.cut_at])


@pytest.fixture
def host(monkeypatch):
    """A download host. It sends `content` up to byte `cut_at` and remembers the ranges that were asked for."""
    pytest.importorskip("gdown", reason="downloads need the extra gdown")
    monkeypatch.setattr(weights, "RETRIES", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cut_at, server.ranges = None, None, []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/s.pth"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def test_the_list_names_all_weights_and_where_they_are(capsys, mirror):
    with pytest.raises(SystemExit, match="no weights NeRD-Rain-S/DDN were released"):
        weights.main(["NeRD-Rain-S/Rain200L", "NeRD-Rain-S/DDN", "--mirror", mirror])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"/".join(name) for name in weights.released_weights()} | {"own"} <= set(lines)
    assert lines["own"].endswith("checkpoints/nerd_rain_s.pth")
    assert lines["NeRD-Rain-S/Rain200L"].endswith("released/NeRD-Rain-S/Rain200L.pth")
    assert "not here: https://drive.google.com/" in lines["NeRD-Rain/Rain200L"]


def test_an_interrupted_download_leaves_nothing_in_place_and_is_resumed(host, narrow_weights, tmp_path):
    host.content, host.cut_at = narrow_weights.read_bytes(), 1_000_000
    with pytest.raises(UserError, match=r"s\.pth could not be fetched .*incomplete.*the same command resumes it"):
        weights.fetch(host.url, tmp_path / "new" / "s.pth", "NeRD-Rain-S")
    (part,) = (tmp_path / "new").iterdir()
    received = part.stat().st_size
    assert 0 < received <= 1_000_000
    host.cut_at = None
    weights.fetch(host.url, tmp_path / "new" / "s.pth", "NeRD-Rain-S")
    assert host.ranges[-1] == f"bytes={received}-"
    assert (tmp_path / "new" / "s.pth").read_bytes() == host.content
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_only_the_right_network_takes_its_place(host, narrow_weights, tmp_path):
    other = tmp_path / "other.pth"
    save_checkpoint(other, state_dict=ablations.build(8, (1, 1, 2)).state_dict())
    contents = {
        "or is no PyTorch file": b"\n<!DOCTYPE html><html><title>Quota exceeded</title></html>",
        "holds a network of width 8": other.read_bytes(),
        "damaged": narrow_weights.read_bytes()[:1_000_000],
        "404": None,
    }
    path = tmp_path / "s" / "s.pth"
    path.parent.mkdir()
    path.write_bytes(b"as it was")
    for message, content in contents.items():
        host.content = content
        with pytest.raises(UserError, match=rf"{host.url}.*({message})"):
            weights.fetch(host.url, path, "NeRD-Rain-S")
        assert [file.name for file in path.parent.iterdir()] == ["s.pth"] and path.read_bytes() == b"as it was"


def test_google_drive_is_asked_without_a_mirror(monkeypatch, narrow_weights, mirror):
    asked = []
    monkeypatch.setattr(weights, "download", lambda url, path: asked.append(url) or shutil.copy(narrow_weights, path))
    weights.load_released("NeRD-Rain-S", "SPA-Data")
    weights.load_released("NeRD-Rain-S", "SPA-Data", mirror="https://another")  # is here by now
    weights.load_released("NeRD-Rain-S", "Rain200L", mirror=mirror)
    assert asked == ["https://drive.google.com/uc?id=1oO5Q4ZDFF983uXL2isYzzdV3BwPXY0Ru"]


def test_errors_name_the_pages_to_download_from_and_the_place(mirror, monkeypatch, tmp_path):
    place, page = r"NeRD-Rain-S/Rain200H\.pth", "1WXjrM50r7m8YjPKZOqmfNeJU57WEjZzc/view"
    with pytest.raises(UserError, match=rf"(?s)mirror/{place} does not exist.*{page}.*code twg1.*released/{place}$"):
        weights.load_released("NeRD-Rain-S", "Rain200H", mirror=mirror)
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r"pip install 'gdown>=6\.3'"):
        weights.load_released("NeRD-Rain-S", "Rain200H")
    shutil.copytree(f"{mirror}/NeRD-Rain-S", tmp_path / "released" / "NeRD-Rain", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"NeRD-Rain/Rain200L\.pth holds NeRD-Rain-S, not NeRD-Rain"):
        weights.load_released("NeRD-Rain", "Rain200L")
