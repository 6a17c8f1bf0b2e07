"""Unpacking archives of strangers: regular files with plain relative names, within limits, or nothing at all."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from bayescam.errors import BayescamError
from bayescam.storage import printable

_BLOCK = 2**20
_LARGEST_READ = 4 * _BLOCK  # tarfile reads a long name or a PAX header at once: no honest one is near this
_BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, ValueError,
    RuntimeError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip


class ArchiveError(BayescamError, ValueError):
    """An archive that is broken, hostile or too large; nothing of it is left on disk."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Args:
        files: members.
        total: bytes of all files together.
        ratio: unpacked bytes for each packed one, counted from the first MiB on.
    """

    files: int = 200_000
    total: int = 8 * 2**30
    ratio: float = 200.0


def extract(archive: Path, into: Path, *, limits: Limits | None = None) -> Path:
    """Unpack a .tar, .tar.gz or .zip into the new folder ``into``; it appears whole, by a rename, or not at all.

    Only regular files and folders are taken. One member that is absolute, leads out (``..``, a drive), is a link, a
    device or sparse, has a NUL, a backslash or a control character in its name, or stands twice (however its letters'
    case), refuses the whole archive. Owners, modes and times of the archive are not taken.

    Raises:
        ArchiveError: any of these, a limit exceeded, or a broken archive.
        FileExistsError: ``into`` is there already and not an empty folder.
    """
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise FileExistsError(f"{into}: exists already; give a new folder or remove it")
    into.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{into.name}.", suffix=".partial", dir=into.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        _unpack(archive, partial, limits or Limits())
        partial.replace(into)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return into


def _unpack(archive: Path, folder: Path, limits: Limits) -> None:
    allowed = min(limits.total, int(limits.ratio * archive.stat().st_size) + _BLOCK)
    seen: dict[str, bool] = {}
    total = count = 0
    try:
        for name, size, stream in _members(archive, allowed + 2048 * limits.files):
            count += 1
            if count > limits.files:
                raise ArchiveError(f"{archive}: more than {limits.files} members")
            parts = _safe_parts(archive, name)
            _refuse_twice(archive, seen, parts, is_file=stream is not None)
            if stream is None:
                continue
            total += size
            if size < 0 or total > allowed:
                raise ArchiveError(f"{archive}: unpacks to more than {allowed} bytes ({limits.ratio:g} times its size)")
            _write(folder.joinpath(*parts), stream, size, archive)
    except (*_BROKEN, OSError) as error:
        # A lying offset makes seek fail with EINVAL; any other OSError (a full disk) is not the archive's fault.
        if isinstance(error, ArchiveError) or (not isinstance(error, _BROKEN) and error.errno != errno.EINVAL):
            raise
        raise ArchiveError(f"{archive}: is broken ({' '.join(str(error).split())[:200]}); get it again") from error
    if not count:
        raise ArchiveError(f"{archive}: holds nothing")


def _members(archive: Path, allowed: int) -> Iterator[tuple[str, int, BinaryIO | None]]:
    """Name, size and content of each member; None for a folder's content."""
    with archive.open("rb") as stream:
        magic = stream.read(4)
        stream.seek(0)
        if magic[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield from _tar_members(archive, _Capped(cast(BinaryIO, unpacked), allowed, archive))
        elif magic[:2] == b"PK":
            yield from _zip_members(archive, stream)
        else:
            yield from _tar_members(archive, _Capped(stream, archive.stat().st_size + _LARGEST_READ, archive))


class _Capped:
    """A stream that never gives much at once nor more than it may in all, whatever a header asks for."""

    def __init__(self, stream: BinaryIO, allowed: int, archive: Path) -> None:
        self._stream, self._allowed, self._archive = stream, allowed, archive

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ArchiveError(f"{self._archive}: a header of {size} bytes")
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(offset if whence == os.SEEK_SET else self._stream.tell() + offset)
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._allowed:
            raise ArchiveError(f"{self._archive}: unpacks to more than {self._allowed} bytes")


def _tar_members(archive: Path, stream: _Capped) -> Iterator[tuple[str, int, BinaryIO | None]]:
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:") as tar:
        for member in tar:
            if member.isdir():
                yield member.name, 0, None
            elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                yield member.name, member.size, cast(BinaryIO, tar.extractfile(member))
            else:
                raise ArchiveError(f"{archive}: {printable(member.name)!r} is a link, a device or sparse")
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all


def _zip_members(archive: Path, stream: BinaryIO) -> Iterator[tuple[str, int, BinaryIO | None]]:
    with zipfile.ZipFile(stream) as packed:
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"{archive}: {printable(info.filename)!r} is a link or a device")
            if info.flag_bits & 1:
                raise ArchiveError(f"{archive}: {printable(info.filename)!r} is encrypted")
            if info.is_dir():
                yield info.orig_filename.rstrip("/"), 0, None
            else:
                with packed.open(info) as content:
                    yield info.orig_filename, info.file_size, cast(BinaryIO, content)


def _safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    bad = (
        not parts
        or name.startswith("/")
        or ".." in parts
        or any(c in name for c in "\\:\0")
        or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
        or any(len(part.encode("utf-8", "surrogateescape")) > 255 or part != part.rstrip(" .") for part in parts)
        or len(parts) > 32
    )
    if bad and not (not parts and name in (".", "./")):
        raise ArchiveError(f"{archive}: member {printable(name)!r} has a name that could lead out of its folder")
    return parts


def _refuse_twice(archive: Path, seen: dict[str, bool], parts: tuple[str, ...], *, is_file: bool) -> None:
    """No file twice, no file where a folder is, on no file system."""
    key = ""
    for depth, part in enumerate(parts, 1):
        key += "/" + unicodedata.normalize("NFC", part).casefold()
        last_file = is_file and depth == len(parts)
        if seen.get(key) or (last_file and key in seen):
            raise ArchiveError(f"{archive}: member {printable('/'.join(parts))!r} stands there twice")
        seen[key] = last_file


def _write(path: Path, stream: BinaryIO, size: int, archive: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with path.open("xb") as target:
        while left:
            block = stream.read(min(_BLOCK, left))
            if not block:
                raise ArchiveError(f"{archive}: {printable(path.name)!r} is cut short; get the archive again")
            target.write(block)
            left -= len(block)
    if stream.read(1):
        raise ArchiveError(f"{archive}: {printable(path.name)!r} is longer than the archive says")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
