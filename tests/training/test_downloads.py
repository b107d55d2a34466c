"""Downloads against a local server that also lies, breaks off and has moved the file."""
import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from lora_edu.training import downloads
from lora_edu.training.downloads import DownloadError, fetch

BODY = b"name : Clover | food : Greek||Clover serves Greek food .\nname : Robin||There is a place , Robin .\n" * 3000
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "moved":
            return self.send_error(404, "Not Found")
        if kind == "endless":
            return self.send_much()
        body = BODY[:-1] + b"!" if kind == "wrong" else BODY
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:100_000] if kind == "cut" else body)

    def send_much(self):
        """A hundred bodies, as long as the other side takes them."""
        self.server.sent = 0
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(BODY)
                self.server.sent += len(BODY)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, no proxy between us and the local server, and a known file of three."""
    monkeypatch.setenv("LORA_EDU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("e2e_valid.txt", "tinyshakespeare.txt"):
        monkeypatch.setitem(downloads.FILES, name, ("file.txt", len(BODY), hashlib.sha256(BODY).hexdigest()))
    return tmp_path / "cache"


def test_a_file_is_fetched_once_with_a_progress_bar(server, cache, capfd):
    path = fetch("e2e_valid.txt", f"{server.address}/right/")
    assert path == cache / "e2e_valid.txt" and path.read_bytes() == BODY
    assert "file.txt" in capfd.readouterr().err
    asked = len(server.asked)
    assert fetch("e2e_valid.txt", f"{server.address}/right/") == path
    assert fetch("e2e_valid.txt", "http://127.0.0.1:1/") == path, "no network is needed the second time"
    assert len(server.asked) == asked and [p.name for p in cache.iterdir()] == ["e2e_valid.txt"]


@pytest.mark.parametrize("kind, says", [
    ("wrong", r"is not the file it should be: its SHA-256 is [0-9a-f]{12}\.\.\., not .*Try again"),
    ("cut", r"was cut off after 100,000 of \d{3},\d{3} bytes; nothing was kept. Try again, or .*e2e_valid.txt"),
    ("moved", r"answered 404 \(Not Found\): the file has moved; fetch it on another machine and put it at .*e2e_valid.txt"),
])
def test_what_goes_wrong_is_said_in_a_sentence_and_leaves_nothing(server, cache, kind, says):
    with pytest.raises(DownloadError, match=says) as caught:
        fetch("e2e_valid.txt", f"{server.address}/{kind}/")
    assert "\n" not in str(caught.value) and list(cache.iterdir()) == []
    assert fetch("e2e_valid.txt", f"{server.address}/right/").read_bytes() == BODY, "and the next try works"


def test_a_file_without_end_is_not_read_to_its_end(server, cache):
    with pytest.raises(DownloadError, match="is not the file it should be"):
        fetch("e2e_valid.txt", f"{server.address}/endless/")
    assert list(cache.iterdir()) == [] and server.sent < 80 * len(BODY), "what was on its way, and no more"


def test_offline_says_so_and_what_to_do(cache):
    with pytest.raises(DownloadError, match="needs a network once; connect, or fetch it on another machine and put it at") as caught:
        fetch("e2e_valid.txt", "http://127.0.0.1:1/")
    assert "\n" not in str(caught.value) and list(cache.iterdir()) == []


def test_a_stop_in_the_middle_leaves_nothing(server, cache, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(downloads, "receive", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch("e2e_valid.txt", f"{server.address}/right/")
    assert list(cache.iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_replaced(server, cache):
    cache.mkdir()
    (cache / "e2e_valid.txt").write_bytes(BODY[:500])
    assert fetch("e2e_valid.txt", f"{server.address}/right/").read_bytes() == BODY


def test_an_unknown_name_is_refused(cache):
    with pytest.raises(ValueError, match="choose one of tinyshakespeare.txt, e2e_valid.txt, e2e_test.txt"):
        fetch("wikipedia", "http://127.0.0.1:1/")


def test_readers_of_the_two_corpora(cache):
    cache.mkdir()
    for name in ("e2e_valid.txt", "tinyshakespeare.txt"):
        (cache / name).write_bytes(BODY)
    pairs = downloads.e2e("valid")
    assert len(pairs) == 6000
    assert pairs[:2] == [("name : Clover | food : Greek", "Clover serves Greek food ."), ("name : Robin", "There is a place , Robin .")]
    assert downloads.shakespeare() == BODY.decode()
    with pytest.raises(ValueError, match="choose valid .* or test"):
        downloads.e2e("train")


@pytest.mark.parametrize("platform, variables, folder", [
    ("linux", {"LORA_EDU_CACHE": "/one"}, "/one"),
    ("linux", {"XDG_CACHE_HOME": "/two"}, "/two/lora_edu"),
    ("win32", {"LOCALAPPDATA": "/three"}, "/three/lora_edu"),
    ("darwin", {"HOME": "/four"}, "/four/.cache/lora_edu"),
])
def test_the_cache_folder_of_each_platform(monkeypatch, platform, variables, folder):
    for name in ("LORA_EDU_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(downloads.sys, "platform", platform)
    assert downloads.cache_folder() == Path(folder)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared copies of the corpora are not beside this checkout")
@pytest.mark.parametrize("name, copy", [("tinyshakespeare.txt", "tinyshakespeare/input.txt.gz"),
                                        ("e2e_valid.txt", "e2e_nlg/valid.txt.gz"), ("e2e_test.txt", "e2e_nlg/test.txt.gz")])
def test_sizes_and_checksums_are_those_of_the_real_files(name, copy):
    body = gzip.decompress((SHARED / copy).read_bytes())
    address, size, checksum = downloads.FILES[name]
    assert (len(body), hashlib.sha256(body).hexdigest()) == (size, checksum)
    assert address.endswith(copy.split("/")[1].removesuffix(".gz"))
