"""Files that are whole or absent: atomic writes and checksums. Every file bayescam writes goes through here."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayescam.errors import FileFormatError

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor


_PARTIAL = ".partial"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success fsync it and rename it onto ``path``.

    On any error the temporary file is removed and whatever stood at ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=_PARTIAL + path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a file is the temporary of a write that was killed: nobody will finish it."""
    return path.name.startswith(".") and _PARTIAL in Path(path.name[1:]).suffixes


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False for a name that no file can have, such as one that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` as UTF-8 to ``path`` atomically."""
    write_bytes(path, content.encode("utf-8", errors="backslashreplace"))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata as one safetensors file, atomically; no code can hide in it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {"bayescam": json.dumps(dict(metadata), sort_keys=True)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(whole, str(temporary), metadata=header)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def load_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote and refuse everything else by name.

    Args:
        path: the file.
        kind: the ``kind`` that the metadata must carry ("backbone", "laplace", ...).

    Raises:
        FileFormatError: absent, truncated, foreign, another kind, or holding NaN or infinite numbers.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; give the path of a {kind} file that bayescam wrote")
    try:
        with safe_open(str(path), framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise FileFormatError(f"{path}: not a whole safetensors file ({error}); write it again") from error
    try:
        metadata = json.loads(header["bayescam"])
        found = metadata["kind"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not written by bayescam (no metadata of ours)") from error
    if found != kind:
        raise FileFormatError(f"{path}: holds a {found!r}, not a {kind!r}; give the right file")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FileFormatError(f"{path}: tensor {name!r} holds NaN or infinite numbers; write it again")
    return tensors, metadata


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileFormatError: absent, unreadable, or something else than one JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not readable as JSON ({error}); restore it or run again") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: holds no JSON object; restore it or run again")
    return content


def save_netcdf(path: Path, groups: Mapping[str | None, xr.Dataset]) -> None:
    """Write datasets as the groups of one NetCDF file, atomically; the group None is the root.

    The file is made in memory: HDF5 that meets a full disk can take the whole process down.
    """
    buffer = io.BytesIO()
    for name, dataset in groups.items():
        dataset.to_netcdf(buffer, mode="a" if buffer.getbuffer().nbytes else "w", group=name, engine="h5netcdf")
    write_bytes(path, buffer.getvalue())


def load_netcdf(path: Path, group: str | None = None) -> xr.Dataset:
    """One group of a NetCDF file, in memory, with the file closed.

    Raises:
        FileFormatError: absent, broken, without the group, or claiming more numbers than the file can hold.
    """
    import h5py
    import xarray as xr

    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; run again")
    try:
        with h5py.File(path) as raw:
            dict(raw.attrs)  # where these are broken, h5netcdf would complain twice
        with warnings.catch_warnings(action="ignore"), xr.open_dataset(path, group=group, engine="h5netcdf") as stored:
            if stored.nbytes > 16 * path.stat().st_size + 2**20:
                raise ValueError(f"claims {stored.nbytes} bytes of numbers")
            return stored.load()
    except Exception as error:  # HDF5 and its readers raise almost anything at foreign bytes
        where = "" if group is None else f" in group {group!r}"
        raise FileFormatError(f"{path}: not a whole NetCDF file{where} ({_one_line(error)}); run again") from error


def netcdf_groups(path: Path) -> list[str]:
    """The names of a NetCDF file's groups.

    Raises:
        FileFormatError: absent or broken.
    """
    import h5py

    try:
        with h5py.File(path) as stored:
            return [str(name) for name, part in stored.items() if isinstance(part, h5py.Group)]
    except Exception as error:  # as above
        raise FileFormatError(f"{path}: not a whole NetCDF file ({_one_line(error)}); run again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table whose cells are inert in a spreadsheet: text that begins like a formula gets a leading quote."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[inert(cell) for cell in row] for row in rows])
    write_text(path, text.getvalue())


def inert(cell: object) -> object:
    """A cell that no spreadsheet computes."""
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + cell
    return cell


def printable(name: str, limit: int = 200) -> str:
    """A name as one harmless line: control characters and undecodable bytes escaped, the middle of long names cut out.

    In place of what was cut stand eight hex digits of the whole name's SHA-256, so that two names stay two.
    """
    text = name.encode("utf-8", errors="backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(text) <= limit:
        return text
    mark = f"…{hashlib.sha256(name.encode('utf-8', errors='surrogatepass')).hexdigest()[:8]}…"
    kept = max(0, limit - len(mark))
    return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]
