"""Downloads against a server on this machine: nothing unverified is ever kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from bayescam.cli import main
from bayescam.data import fetch
from bayescam.data.archive import ArchiveError
from bayescam.data.dataset import DataError, open_dataset
from bayescam.data.fetch import Download, FetchError, fetch_file, fetch_mednist
from bayescam.data.mednist import CLASSES
from bayescam.errors import UsageError

HTTP = ("http",)
CONTENT = np.random.default_rng(0).bytes(700_000)


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes] = {"/file": CONTENT}  # noqa: RUF012

    def do_GET(self):
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
        elif self.path == "/to-file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/to-ftp":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/x")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # until the client hangs up
                while True:
                    self.wfile.write(bytes(2**16))
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000])
        elif self.path in self.files:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.files[self.path])))
            self.end_headers()
            self.wfile.write(self.files[self.path])
        else:
            self.send_error(404)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def _download(address, content=CONTENT, **changes):
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return replace(Download("x.bin", address, digest, 2**20, "none"), **changes)


@pytest.mark.parametrize("path", ["/file", "/redirect"])
@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_file_arrives_verified(server, tmp_path, path, size, capsys):
    target = fetch_file(_download(server + path, size=size), tmp_path / "deep" / "x.bin", schemes=HTTP)
    assert target.read_bytes() == CONTENT
    assert [p.name for p in target.parent.iterdir()] == ["x.bin"]
    assert ("redirected to 127.0.0.1" in capsys.readouterr().err) == (path == "/redirect")


def test_a_file_address_works_where_it_is_allowed(tmp_path):
    (tmp_path / "source").write_bytes(CONTENT)
    address = (tmp_path / "source").as_uri()
    assert fetch_file(_download(address), tmp_path / "x", schemes=("file",)).read_bytes() == CONTENT
    with pytest.raises(FetchError, match="only https is allowed"):
        fetch_file(_download(address), tmp_path / "y")


@pytest.mark.parametrize(
    ("path", "changes", "match"),
    [
        ("/file", {"digest": "md5:" + "0" * 32}, "its hash is md5:"),
        ("/file", {"largest": 1000}, "announces 700000 bytes, not 1000"),
        ("/file", {"size": 699_999}, "announces 700000 bytes"),
        ("/endless", {}, "sends more than 1048576 bytes"),
        ("/cut", {}, r"sent 1000 of 700000 bytes|IncompleteRead"),
        ("/absent", {}, "Not Found.*by hand"),
        ("/to-file", {}, "not allowed"),
        ("/to-ftp", {}, "only http is allowed, not 'ftp'"),
    ],
)
def test_nothing_of_a_failed_download_is_kept(server, tmp_path, path, changes, match):
    (tmp_path / "x.bin").write_bytes(b"the old one")
    with pytest.raises(FetchError, match=match):
        fetch_file(_download(server + path, **changes), tmp_path / "x.bin", schemes=HTTP)
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    assert (tmp_path / "x.bin").read_bytes() == b"the old one"


def test_plain_http_is_refused_by_default(server, tmp_path):
    with pytest.raises(FetchError, match="only https is allowed"):
        fetch_file(_download(server + "/file"), tmp_path / "x")


def test_nobody_there(tmp_path):
    with pytest.raises(FetchError, match="check the network"):
        fetch_file(_download("http://127.0.0.1:9/x"), tmp_path / "x", schemes=HTTP)


def test_a_full_disk_is_told_before_the_download(tmp_path):
    with pytest.raises(FetchError, match="MiB of free space"):
        fetch_file(_download("http://127.0.0.1:9/x", largest=2**60), tmp_path / "x", schemes=HTTP)


def _mednist_archive(names):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in names:
            picture = io.BytesIO()
            Image.fromarray(np.full((64, 64), 9, np.uint8)).save(picture, "JPEG")
            info = tarfile.TarInfo(name)
            info.size = picture.tell()
            tar.addfile(info, io.BytesIO(picture.getvalue()))
    return stream.getvalue()


def test_mednist_from_address_to_data_set(server, tmp_path, capsys):
    content = _mednist_archive([f"MedNIST/{name}/{i:06d}.jpeg" for name in CLASSES for i in range(2)])
    _Handler.files["/mednist"] = content
    download = _download(server + "/mednist", content, name="MedNIST.tar.gz", licence="CC BY-SA 4.0")
    out = tmp_path / "mednist"
    with pytest.raises(UsageError, match="--accept-licence"):
        fetch_mednist(out, accept_licence=False, download=download, schemes=HTTP)
    said = capsys.readouterr().err
    assert all(text in said for text in (download.address, "at most 1 MiB", "CC BY-SA 4.0", str(out)))
    assert list(tmp_path.iterdir()) == []
    words = fetch_mednist(out, accept_licence=True, download=download, schemes=HTTP)
    assert "12 images (MedNIST has 58,954)" in words
    assert f"--root {out}" in words
    assert [p.name for p in tmp_path.iterdir()] == ["mednist"]
    opened = open_dataset("mednist", root=out)
    assert (opened.name, opened.classes, len(opened)) == ("mednist", CLASSES, 12)
    assert "already" in fetch_mednist(out, accept_licence=True, download=_download("http://127.0.0.1:9/"), schemes=HTTP)


def test_a_hostile_mednist_leaves_nothing(server, tmp_path):
    content = _mednist_archive(["MedNIST/Hand/0.jpeg", "../Hand/1.jpeg"])
    _Handler.files["/hostile"] = content
    with pytest.raises(ArchiveError):
        fetch_mednist(
            tmp_path / "m", accept_licence=True, download=_download(server + "/hostile", content), schemes=HTTP
        )
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_filled(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").touch()
    with pytest.raises(DataError, match="mednist: not at"):
        fetch_mednist(tmp_path / "m", accept_licence=True)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["mine.txt"]


def test_the_pinned_address_is_https_with_a_hash():
    assert fetch.MEDNIST.address.startswith("https://")
    assert fetch.MEDNIST.digest.startswith("md5:")
    assert fetch.MEDNIST.largest < 2**27


def test_the_command_says_where_to_apply_for_mura(capsys):
    assert main(["data", "fetch", "mura"]) == 0
    said = capsys.readouterr().out
    assert "aimi.stanford.edu" in said
    assert "redistribution" in said


def test_the_command_asks_for_the_licence(capsys, tmp_path):
    assert main(["data", "fetch", "mednist", "--out", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert "CC BY-SA 4.0" in said
    assert said.splitlines()[-1].startswith("bayescam: the licence was not accepted")
