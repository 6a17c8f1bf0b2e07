"""One radiograph in: the only way pixels enter bayescam."""

from __future__ import annotations

import os
import stat
import threading
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bayescam.errors import BayescamError
from bayescam.storage import printable

MAX_PIXELS = 64 * 2**20
MIN_SIDE = 8
MAX_ASPECT = 30.0
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_BLOCK = 2**18
_ROOM = 2**26  # for metadata
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageError(BayescamError, ValueError):
    """A file that is not a readable radiograph.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"{printable(str(path))}: {reason}")


class _Quiet:
    """Decoders' warnings off while any thread decodes: ``warnings.catch_warnings`` alone is not safe among threads."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


QUIET = _Quiet()


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one radiograph as grey values in [0, 1], 0 black.

    8-bit values are divided by 255, 16-bit values by 65,535 (by 2^b - 1 where the file says that b bits carry signal:
    PNG's sBIT, DICOM's BitsStored). Colour becomes Rec. 601 luma (8 bits a channel, also where the file has 16), alpha
    is composited on black, EXIF orientation is applied. The file is never changed.

    Args:
        path: a PNG, JPEG, TIFF or BMP file, whatever its suffix, or DICOM (needs the ``dicom`` extra).
        max_pixels: larger images are refused by their header, before decoding.

    Returns:
        float32 (H, W).

    Raises:
        ImageError: anything else; it names the file and the reason.
    """
    try:
        with _opened(path, max_pixels) as stream:
            head = stream.read(132)
            stream.seek(0)
            if not head:
                raise ImageError(path, "the file is empty")
            if head[128:132] == b"DICM":
                from bayescam.data.dicom import read_dicom

                values = read_dicom(stream, path, max_pixels)
            else:
                values = _decode(stream, path, max_pixels)
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(path, f"not a usable path ({error})") from error
    if not np.isfinite(values).all():
        raise ImageError(path, "holds NaN or infinite values")
    return np.ascontiguousarray(values, dtype=np.float32)


def check_size(path: str | os.PathLike[str], width: int, height: int, max_pixels: int) -> None:
    """Refuse a size that no radiograph has, from the header alone."""
    if width * height > max_pixels:
        raise ImageError(path, f"{width} x {height} pixels are more than the allowed {max_pixels}")
    if min(width, height) < MIN_SIDE:
        raise ImageError(path, f"{width} x {height} pixels are too few (at least {MIN_SIDE} a side)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(path, f"{width} x {height} is more than {MAX_ASPECT:g} times longer than wide")


def _opened(path: str | os.PathLike[str], max_pixels: int) -> BinaryIO:
    """The file, only if it is a regular one, a FIFO would block for ever, and no longer than such an image can be."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(path, "is not a regular file")
    if found.st_size > 8 * max_pixels + _ROOM:
        raise ImageError(path, f"{found.st_size} bytes are more than {max_pixels} pixels need")
    return open(path, "rb")


def _decode(stream: BinaryIO, path: str | os.PathLike[str], max_pixels: int) -> np.ndarray:
    try:
        with QUIET, Image.open(stream, formats=_FORMATS) as image:
            check_size(path, *image.size, max_pixels)
            if getattr(image, "n_frames", 1) > 1:
                raise ImageError(path, "has several frames; give one image a file")
            bits = _checked_png(stream, path) if image.format == "PNG" else None
            image.load()
            return _grey(ImageOps.exif_transpose(image), bits, path)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, "is not a PNG, JPEG, TIFF, BMP or DICOM image") from error
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"more than the allowed {max_pixels} pixels") from error
    except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ImageError(path, f"is broken ({error})") from error


def _grey(image: Image.Image, bits: int | None, path: str | os.PathLike[str]) -> np.ndarray:
    if image.mode in _SIXTEEN:
        return _scaled(np.asarray(image), 16, bits)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(path, f"32-bit values in [{values.min()}, {values.max()}]; save it with 16 bits")
        return _scaled(values, 16, bits)
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ImageError(path, "holds NaN or infinite values")
        if values.min() < 0 or values.max() > 1:
            raise ImageError(path, f"float values in [{values.min():g}, {values.max():g}]; scale them to [0, 1]")
        return values
    return _eight_bit(image, bits)


def _eight_bit(image: Image.Image, bits: int | None) -> np.ndarray:
    if image.mode == "1":
        return np.asarray(image, dtype=np.float32)
    if image.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 2:
        return _scaled(values, 8, bits)
    luma = np.zeros(values.shape[:2], dtype=np.float32)
    for channel, share in enumerate(_LUMA):
        luma += np.float32(share / 255) * values[..., channel]
    if values.shape[2] == 4:
        luma *= values[..., 3] / np.float32(255)
    return np.minimum(luma, np.float32(1))


def _scaled(values: np.ndarray, depth: int, bits: int | None) -> np.ndarray:
    """Values over the full range; where only ``bits`` of ``depth`` carry signal, their own full range is white."""
    if bits is None or bits >= depth:
        return values / np.float32(2**depth - 1)
    shift, highest = depth - bits, 2**bits - 1
    if values.max() > highest or _fills(values, depth, bits):
        return (values >> shift) / np.float32(highest)
    return values / np.float32(highest)


def _fills(values: np.ndarray, depth: int, bits: int) -> bool:
    """Whether a picture, however dark, was scaled up to ``depth`` as PNG asks: low bits zero, or by the rule of three.

    The largest value cannot tell: a dark picture scaled up has small values too, and would come out 2^(depth - bits)
    times too bright.
    """
    shift = depth - bits
    signal = (values >> shift).astype(np.int64)
    proportional = np.abs(signal * ((2**depth - 1) / (2**bits - 1)) - values)
    return bool((values == signal << shift).all() or (proportional <= 1).all())


def _checked_png(stream: BinaryIO, path: str | os.PathLike[str]) -> int | None:
    """Compare every chunk with its checksum, which the decoder does not; the bits of a grey sBIT chunk, if any."""
    position, significant = stream.tell(), None
    stream.seek(8)
    try:
        while len(header := stream.read(8)) == 8:
            left, kind = int.from_bytes(header[:4], "big"), header[4:]
            found = zlib.crc32(kind)
            first = b""
            while left and (block := stream.read(min(left, _BLOCK))):
                found, left, first = zlib.crc32(block, found), left - len(block), first or block
            stored = stream.read(4)
            if len(stored) == 4 and int.from_bytes(stored, "big") != found:
                raise ImageError(path, f"is broken (wrong checksum of chunk {kind!r})")
            if kind == b"sBIT" and len(first) == 1 and first[0] > 0:
                significant = first[0]
            if kind == b"IEND":
                break
        return significant
    finally:
        stream.seek(position)
