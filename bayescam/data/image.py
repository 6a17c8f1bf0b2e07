"""One radiograph in: the only way pixels enter bayescam."""

from __future__ import annotations

import os
import stat
import warnings
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


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one radiograph as grey values in [0, 1], 0 black.

    8-bit values are divided by 255, 16-bit values by 65,535 (by 2^b - 1 where the file says that b bits carry signal:
    PNG's sBIT, DICOM's BitsStored). Colour becomes Rec. 601 luma, alpha is composited on black, EXIF orientation is
    applied. The file is never changed.

    Args:
        path: a PNG, JPEG, TIFF or BMP file, whatever its suffix, or DICOM (needs the ``dicom`` extra).
        max_pixels: larger images are refused by their header, before decoding.

    Returns:
        float32 (H, W).

    Raises:
        ImageError: anything else; it names the file and the reason.
    """
    try:
        with _opened(path) as stream:
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


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, only if it is a regular one: a FIFO would block for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError(path, "is not a regular file")
    return open(path, "rb")


def _decode(stream: BinaryIO, path: str | os.PathLike[str], max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=_FORMATS) as image:
                check_size(path, *image.size, max_pixels)
                if getattr(image, "n_frames", 1) > 1:
                    raise ImageError(path, "has several frames; give one image a file")
                bits = _significant_bits(stream) if image.format == "PNG" else None
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
        return _scaled(np.asarray(image).astype(np.float64), 16, bits)
    if image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(path, f"32-bit values reach {values.max():g}; save it with 16 bits")
        return _scaled(values, 16, bits)
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ImageError(path, "holds NaN or infinite values")
        if values.min() < 0 or values.max() > 1:
            raise ImageError(path, f"float values in [{values.min():g}, {values.max():g}]; scale them to [0, 1]")
        return values
    return _eight_bit(image, bits)


def _eight_bit(image: Image.Image, bits: int | None) -> np.ndarray:
    if image.mode == "1":
        return np.asarray(image).astype(np.float64)
    if image.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    if values.ndim == 2:
        return _scaled(values, 8, bits)
    luma = values[..., :3] @ np.array([0.299, 0.587, 0.114])
    if values.shape[2] == 4:
        luma *= values[..., 3] / 255
    return luma / 255


def _scaled(values: np.ndarray, depth: int, bits: int | None) -> np.ndarray:
    """Values over the full range; where only ``bits`` of ``depth`` carry signal, their own full range is white."""
    if bits is None or bits >= depth:
        return values / (2**depth - 1)
    highest = 2**bits - 1
    if values.max() > highest:  # PNG encoders scale up to the full depth: the high bits carry the signal
        return np.floor(values / 2 ** (depth - bits)) / highest
    return values / highest


def _significant_bits(stream: BinaryIO) -> int | None:
    """The bits of a grey PNG's sBIT chunk, None where the file has none."""
    position = stream.tell()
    try:
        stream.seek(8)
        for _ in range(64):
            header = stream.read(8)
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if len(header) < 8 or kind in (b"IDAT", b"IEND"):
                return None
            if kind == b"sBIT":
                bits = stream.read(length)
                return bits[0] if length == 1 and bits and bits[0] > 0 else None
            stream.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        stream.seek(position)
