import http.server
import threading

import pytest
import torch

from model import MultiscaleNet
from utils import checkpoint, download
from utils.checkpoint import load_network
from utils.errors import UserError

pytest.importorskip("gdown", reason="downloads need the extra gdown")


class Host(http.server.ThreadingHTTPServer):
    """A download host: `files` maps paths to contents, `cut` is how many bytes it sends before the line goes dead."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.ranges, self.requested = {}, None, True, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : start + (self.server.cut or len(content))])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Host()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def weights(narrow_weights, monkeypatch, host):
    """The narrow network's checkpoint, which the host has and which counts as NeRD-Rain-S here."""
    monkeypatch.setitem(checkpoint.PUBLISHED, (8, (1, 1, 1), (1, 2, 4)), "NeRD-Rain-S")
    host.files["/s.pth"] = narrow_weights.read_bytes()
    return narrow_weights


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_weights_are_fetched_and_loaded(host, weights, tmp_path):
    download.fetch_network(f"{host.url}/s.pth", tmp_path / "new" / "s.pth", "NeRD-Rain-S")
    assert (tmp_path / "new" / "s.pth").read_bytes() == weights.read_bytes()
    assert left_in(tmp_path / "new") == ["s.pth"]


def test_a_local_mirror_is_copied(weights, tmp_path):
    download.fetch_network(weights, tmp_path / "s.pth", "NeRD-Rain-S")
    assert (tmp_path / "s.pth").read_bytes() == weights.read_bytes() and weights.exists()
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        download.fetch_network(tmp_path / "none.pth", tmp_path / "t.pth", "NeRD-Rain-S")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_leaves_nothing_in_place_and_is_continued(host, weights, tmp_path, ranges):
    host.cut, host.ranges = 1_000_000, ranges
    with pytest.raises(UserError, match=r"s\.pth could not be fetched .*incomplete.* MiB of it are kept, repeat"):
        download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    assert not (tmp_path / "s.pth").exists()
    kept = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 500_000 < kept <= 1_000_000
    host.cut = None
    download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    assert f"bytes={kept}-" in host.requested
    assert (tmp_path / "s.pth").read_bytes() == weights.read_bytes() and left_in(tmp_path) == ["s.pth"]


@pytest.fixture
def other_weights(weights, tmp_path_factory):
    """Another checkpoint of the same length."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("other") / weights.name
    torch.save({"epoch": 1, "state_dict": MultiscaleNet(dim=8, num_blocks=(1, 1, 1)).state_dict()}, path)
    assert path.stat().st_size == weights.stat().st_size
    return path


@pytest.mark.parametrize("where", ["another url", "the same url"])
def test_two_downloads_are_never_mixed(host, weights, other_weights, tmp_path, where):
    host.cut = 1_000_000
    with pytest.raises(UserError, match="incomplete"):
        download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    host.cut = None
    name = "other.pth" if where == "another url" else "s.pth"
    host.files[f"/{name}"] = other_weights.read_bytes()
    download.fetch_network(f"{host.url}/{name}", tmp_path / "s.pth", "NeRD-Rain-S")
    assert (tmp_path / "s.pth").read_bytes() == other_weights.read_bytes()


def test_damage_on_the_way_is_noticed(host, weights, tmp_path):
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    host.files["/s.pth"] = bytes(content)
    with pytest.raises(UserError, match=r"s\.pth sent no checkpoint of a network: .* is damaged"):
        download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(weights, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be used"):
        download.fetch_network(weights, tmp_path / "file" / "s.pth", "NeRD-Rain-S")


def test_a_web_page_is_no_checkpoint(host, tmp_path):
    host.files["/s.pth"] = b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
    with pytest.raises(UserError, match=r"s\.pth sent a web page .*Quota exceeded"):
        download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    assert left_in(tmp_path) == []


def test_wrong_files_are_refused_and_do_not_stay(host, weights, tmp_path):
    torch.save({"state_dict": MultiscaleNet(8, (1, 1, 2)).state_dict()}, tmp_path / "other.pth")
    whole = weights.read_bytes()
    contents = {
        "holds a network of width 8": (tmp_path / "other.pth").read_bytes(),
        "sent no checkpoint": whole[: len(whole) // 2],
        "sent no checkpoint of": b"PK\x03\x04" + bytes(1000),
        "something else than tensors": b'{"error": "quota"}',
    }
    for message, content in contents.items():
        host.files["/s.pth"] = content
        with pytest.raises(UserError, match=f"{host.url}/s.pth.*({message})"):
            download.fetch_network(f"{host.url}/s.pth", tmp_path / "new" / "s.pth", "NeRD-Rain-S")
        assert left_in(tmp_path / "new") == []


def test_what_is_there_stays_when_a_download_fails(host, weights, tmp_path):
    (tmp_path / "s.pth").write_bytes(weights.read_bytes())
    host.files["/s.pth"] = b"<html></html>"
    with pytest.raises(UserError, match="web page"):
        download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    assert load_network(tmp_path / "s.pth")


def test_hosts_that_refuse_or_are_not_there(host, tmp_path):
    with pytest.raises(UserError, match="404"):
        download.fetch_network(f"{host.url}/none.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    host.shutdown()
    host.server_close()
    with pytest.raises(UserError, match="could not be fetched"):
        download.fetch_network(f"{host.url}/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
    assert left_in(tmp_path) == []


def test_without_gdown_its_installation_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "gdown", None)
    with pytest.raises(UserError, match="pip install 'gdown>=6'"):
        download.fetch_network("http://127.0.0.1:1/s.pth", tmp_path / "s.pth", "NeRD-Rain-S")
