"""DICOM radiographs, behind the ``dicom`` extra."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from bayescam.data.image import QUIET, ImageError, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # its whole content would be inflated unseen


def read_dicom(stream: BinaryIO, path: str | os.PathLike[str], max_pixels: int) -> np.ndarray:
    """Grey values in [0, 1], bones bright: rescaled, windowed where the file has a window, MONOCHROME1 turned.

    Raises:
        ImageError: no pydicom, several frames, colour, a codec that is not installed, or a broken file.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImageError(path, "is DICOM; install the extra: pip install 'bayescam[dicom]'") from error
    if _DEFLATED in stream.read(4096):
        raise ImageError(path, "DICOM in a deflated transfer syntax; save it in another one")
    stream.seek(0)
    try:
        with QUIET:
            dataset = pydicom.dcmread(stream)
            _check(dataset, path, max_pixels)
            return _windowed(dataset, dataset.pixel_array.astype(np.float32), path)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(path, f"DICOM that cannot be decoded ({' '.join(str(error).split())[:200]})") from error


def _check(dataset: Dataset, path: str | os.PathLike[str], max_pixels: int) -> None:
    if "PixelData" not in dataset:
        raise ImageError(path, "DICOM without pixels")
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(
            path, f"DICOM with photometric interpretation {photometric!r}; only MONOCHROME1 and 2 are read"
        )
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise ImageError(path, "DICOM with several frames; give one image a file")
    check_size(path, int(dataset.Columns), int(dataset.Rows), max_pixels)


def _windowed(dataset: Dataset, values: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    bits, signed = int(dataset.get("BitsStored", 16)), int(dataset.get("PixelRepresentation", 0)) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = sorted((low * slope + intercept, high * slope + intercept))
    values = values * slope + intercept
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if centre is not None and width is not None and width > 1:
        # DICOM PS3.3 C.11.2.1.2: the linear function of window centre and width.
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if not (np.isfinite([low, high]).all() and high > low):
        raise ImageError(path, f"DICOM whose grey values reach from {low:g} to {high:g}")
    scaled = np.clip((values - low) / (high - low), 0, 1)
    return 1 - scaled if dataset.PhotometricInterpretation == "MONOCHROME1" else scaled


def _first(value: object) -> float | None:
    """DICOM windows may be lists; the first is the default one."""
    if value is None or value == "":
        return None
    first = value[0] if isinstance(value, list | tuple) or hasattr(value, "__getitem__") else value
    return float(first)  # type: ignore[arg-type]
