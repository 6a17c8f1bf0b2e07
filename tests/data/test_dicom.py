"""DICOM radiographs: bones bright, whatever the file's photometric interpretation, bits, slope and window."""

from __future__ import annotations

import builtins
import io
import random

import numpy as np
import pytest

from bayescam.data.image import ImageError, read_image

pydicom = pytest.importorskip("pydicom")

VALUES = (np.arange(400).reshape(20, 20) * 10 + 50).astype(np.uint16)  # 50 to 4040


def dicom(values=VALUES, *, preamble=True, drop=(), frames=None, syntax=None, **tags) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    dataset = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "1"
    dataset.PixelData = values.tobytes()
    if frames:
        dataset.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(dataset, name, value)
    for name in drop:
        delattr(dataset, name)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue() if preamble else stream.getvalue()[132:]


def _read(tmp_path, content):
    (tmp_path / "no-suffix").write_bytes(content)
    return read_image(tmp_path / "no-suffix")


LINEAR = VALUES / 4095


@pytest.mark.parametrize(
    ("tags", "truth"),
    [
        ({}, LINEAR),
        ({"BitsStored": 16, "HighBit": 15}, VALUES / 65535),
        ({"PhotometricInterpretation": "MONOCHROME1"}, 1 - LINEAR),
        ({"RescaleSlope": "2", "RescaleIntercept": "-100"}, LINEAR),
        ({"RescaleSlope": "-1", "RescaleIntercept": "4095"}, 1 - LINEAR),
        ({"WindowCenter": "2000.5", "WindowWidth": "1001"}, np.clip((VALUES - 1500.0) / 1000, 0, 1)),
        ({"WindowCenter": ["2000.5", "9"], "WindowWidth": ["1001", "9"]}, np.clip((VALUES - 1500.0) / 1000, 0, 1)),
        (
            {"RescaleSlope": "2", "RescaleIntercept": "10", "WindowCenter": "2000.5", "WindowWidth": "1001"},
            np.clip((2 * VALUES + 10 - 1500.0) / 1000, 0, 1),
        ),
        (
            {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": "2000.5", "WindowWidth": "1001"},
            1 - np.clip((VALUES - 1500.0) / 1000, 0, 1),
        ),
        ({"WindowCenter": "", "WindowWidth": ""}, LINEAR),
        ({"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15}, (VALUES + 32768.0) / 65535),
    ],
)
def test_grey_values(tmp_path, tags, truth):
    np.testing.assert_allclose(_read(tmp_path, dicom(**tags)), truth, atol=2e-6)


@pytest.mark.parametrize("codec", ["RLELossless"])
def test_a_compressed_file(tmp_path, codec):
    dataset = pydicom.dcmread(io.BytesIO(dicom()))
    dataset.compress(getattr(pydicom.uid, codec))
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    np.testing.assert_allclose(_read(tmp_path, stream.getvalue()), LINEAR, atol=2e-6)


RGB = np.zeros((20, 20, 3), np.uint8)
BAD = {
    "RGB": ({"PhotometricInterpretation": "RGB"}, "'RGB'; only MONOCHROME1 and 2"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "only MONOCHROME1 and 2"),
    "two frames": ({"values": np.stack([VALUES, VALUES]), "frames": 2}, "several frames"),
    "no pixels": ({"drop": ["PixelData"]}, "without pixels"),
    "no rows": ({"drop": ["Rows"]}, "cannot be decoded"),
    "no bits": ({"drop": ["BitsAllocated"]}, "cannot be decoded"),
    "rows that lie": ({"Rows": 200}, "cannot be decoded"),
    "rows beyond the cap": ({"Rows": 60000, "Columns": 60000}, "more than the allowed"),
    "too small": ({"values": VALUES[:3, :3]}, "too few"),
    "no preamble": ({"preamble": False}, "not a PNG"),
    "zero bits": ({"BitsStored": 0}, "."),
    "an endless window": ({"RescaleSlope": "1e308", "RescaleIntercept": "1e308"}, "."),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_radiograph_is_refused(tmp_path, name):
    options, reason = BAD[name]
    with pytest.raises(ImageError, match=reason):
        _read(tmp_path, dicom(**options))


def test_a_codec_that_is_not_installed_is_named(tmp_path):
    from pydicom.encaps import encapsulate

    content = dicom(syntax=pydicom.uid.JPEG2000Lossless, PixelData=encapsulate([b"\xff\x4f\xff\x51" + bytes(60)]))
    with pytest.raises(ImageError, match=r"cannot be decoded \(.*(pylibjpeg|gdcm|plugin|codec|pillow)"):
        _read(tmp_path, content)


@pytest.mark.parametrize("keep", [140, 300, 600, 900])
def test_a_cut_file_is_refused(tmp_path, keep):
    with pytest.raises(ImageError):
        _read(tmp_path, dicom()[:keep])


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path):
    with pytest.raises(ImageError, match="deflated"):
        _read(tmp_path, dicom(syntax=pydicom.uid.DeflatedExplicitVRLittleEndian))


def test_without_pydicom_the_message_names_the_extra(tmp_path, monkeypatch):
    content, real = dicom(), builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] == "pydicom":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImageError, match=r"pip install 'bayescam\[dicom\]'"):
        _read(tmp_path, content)


def test_no_mutation_breaks_the_reader(tmp_path):
    rng, content = random.Random(0), dicom(WindowCenter="2000", WindowWidth="1000")
    for _ in range(200):
        data = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(132, 700)
            data[at : at + rng.choice([0, 1, 2])] = rng.randbytes(rng.choice([1, 2]))
        try:
            values = _read(tmp_path, data)
        except ImageError:
            continue
        else:
            assert values.ndim == 2
            assert 0 <= values.min() <= values.max() <= 1
