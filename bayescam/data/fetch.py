"""Downloads, only when asked: address, size and licence first; pinned hash; ``.partial``, verified, then renamed."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from bayescam.data.archive import Limits, extract
from bayescam.data.dataset import cache_folder
from bayescam.data.mednist import LICENCE as MEDNIST_LICENCE
from bayescam.data.mednist import mednist_home, open_mednist
from bayescam.data.mura import LICENCE as MURA_LICENCE
from bayescam.data.mura import WHERE
from bayescam.errors import BayescamError, UsageError
from bayescam.storage import atomic_path, printable

_BLOCK = 2**18
_TIMEOUT = 30.0


class FetchError(BayescamError, OSError):
    """A download that failed or is not what it should be; nothing of it is kept."""


@dataclass(frozen=True)
class Download:
    """One file on the web.

    Args:
        name: of the file.
        address: where it lies.
        digest: "sha256:<hex>" or "md5:<hex>".
        largest: bytes at which a download is broken off.
        licence: in words.
        size: bytes, where they are known.
    """

    name: str
    address: str
    digest: str
    largest: int
    licence: str
    size: int | None = None


MEDNIST = Download(
    name="MedNIST.tar.gz",
    address="https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/MedNIST.tar.gz",
    digest="md5:0bc7306e7427e00ad1c5526a6677552d",
    largest=80 * 2**20,
    licence=MEDNIST_LICENCE,
)
MEDNIST_IMAGES = 58_954


def fetch_mednist(
    out: Path | None = None, *, accept_licence: bool, download: Download = MEDNIST, schemes: Sequence[str] = ("https",)
) -> str:
    """Download and unpack MedNIST into ``out`` (default: bayescam's cache) and return what to say at the end.

    Raises:
        UsageError: the licence was not accepted.
        FetchError, ArchiveError, DataError: the download, the archive or what it holds is not as it should be.
    """
    home = mednist_home() if out is None else out
    if home.is_dir() and any(home.iterdir()):
        return f"{len(open_mednist(home))} images are at {home} already; nothing was downloaded"
    most = f"{download.size:,} bytes" if download.size else f"at most {download.largest >> 20} MiB"
    print(
        f"address: {download.address}\nsize:    {most}\nlicence: {download.licence}\ninto:    {home}", file=sys.stderr
    )
    if not accept_licence and not _accepted():
        raise UsageError("the licence was not accepted; say --accept-licence to download")
    packed = (cache_folder() if out is None else home.parent) / download.name
    try:
        fetch_file(download, packed, schemes=schemes)
        extract(packed, home, limits=Limits(files=70_000, total=2**30, ratio=20))
    finally:
        packed.unlink(missing_ok=True)
    opened = open_mednist(home)
    short = "" if len(opened) == MEDNIST_IMAGES else f" (MedNIST has {MEDNIST_IMAGES:,})"
    return f"{len(opened):,} images{short} are at {home}; open them by --data mednist" + (
        "" if out is None else f" --root {home}"
    )


def mura_instructions() -> str:
    """Where MURA comes from: its licence forbids that anyone else hands it out."""
    return (
        f"MURA v1.1 is given out by Stanford alone: apply at {WHERE} (a form, then a link by e-mail).\n"
        f"licence: {MURA_LICENCE}\n"
        "then:    unpack it and run: bayescam run --data mura --root DIR"
    )


def fetch_file(download: Download, target: Path, *, schemes: Sequence[str] = ("https",), progress: bool = True) -> Path:
    """Download to ``target``; it appears there verified, by a rename, or not at all.

    Args:
        download: what.
        target: the file to write.
        schemes: of the address and of every address it redirects to.
        progress: show a bar.

    Raises:
        FetchError: another scheme, no answer, a wrong size or hash, more bytes than allowed, or no room on the disk.
    """
    _check_scheme(download.address, schemes)
    needed = download.size or download.largest
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < needed:
        raise FetchError(f"{target.parent}: needs {needed >> 20} MiB of free space; make room or give another --out")
    with atomic_path(target) as partial:
        try:
            found = _stream(download, partial, schemes, progress)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise FetchError(
                f"{download.address}: {printable(str(getattr(error, 'reason', error)))}; check the network and try "
                f"again, or get {download.name} by hand"
            ) from error
        if found != download.digest:
            raise FetchError(
                f"{download.address}: its hash is {found}, not {download.digest}: another file than bayescam knows; "
                "nothing was kept"
            )
    return target


def _stream(download: Download, partial: Path, schemes: Sequence[str], progress: bool) -> str:
    """Write the answer to ``partial`` and return its digest."""
    algorithm = download.digest.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    opener = urllib.request.build_opener(_Redirects(schemes))
    request = urllib.request.Request(download.address, headers={"User-Agent": "bayescam"})
    with opener.open(request, timeout=_TIMEOUT) as answer, partial.open("wb") as stream:
        length = answer.headers.get("Content-Length") or ""
        announced = int(length) if length.isdecimal() and length.isascii() else None
        limit = download.size or download.largest
        if announced is not None and (announced > limit or (download.size and announced != download.size)):
            raise FetchError(f"{download.address}: announces {announced} bytes, not {limit}; nothing was kept")
        received = 0
        total = announced or download.size
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=download.name, disable=None if progress else True
        ) as bar:
            while block := answer.read(_BLOCK):
                received += len(block)
                if received > limit:
                    raise FetchError(f"{download.address}: sends more than {limit} bytes; nothing was kept")
                digest.update(block)
                stream.write(block)
                bar.update(len(block))
    if received != (total or received):
        raise FetchError(f"{download.address}: sent {received} of {total} bytes; try again")
    return f"{algorithm}:{digest.hexdigest()}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects within the allowed schemes, and say where to."""

    def __init__(self, schemes: Sequence[str]) -> None:
        self._schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl, self._schemes)
        print(f"redirected to {printable(urlsplit(newurl).netloc)}", file=sys.stderr)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(address: str, schemes: Sequence[str]) -> None:
    scheme = urlsplit(address).scheme
    if scheme not in schemes:
        raise FetchError(f"{printable(address)}: only {', '.join(schemes)} is allowed, not {scheme!r}")


def _accepted() -> bool:
    if not sys.stdin.isatty():
        return False
    print("Do you accept this licence? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
