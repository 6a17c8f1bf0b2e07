"""One radiograph in: every kind of good file gives the same picture, every kind of bad one a named error, at once."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import bayescam as bc
from bayescam.data.image import MAX_PIXELS, ImageError, read_image

GREY = np.add.outer(np.arange(24) * 6, np.arange(16) * 7).astype(np.uint8)  # (24, 16), 0 to 243
TRUTH = GREY / 255.0


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: np.ndarray, depth: int, colour: int = 0, extra: bytes = b"", *, end: bool = True) -> bytes:
    """A PNG by hand: Pillow writes neither 16-bit colour nor sBIT."""
    height, width = values.shape[:2]
    rows = values.astype(">u2" if depth == 16 else np.uint8).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = head + extra + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + (chunk(b"IEND", b"") if end else b"")


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _transparent() -> Image.Image:
    """RGBA whose left half is invisible and hides white."""
    rgba = np.repeat(GREY[..., None], 4, 2)
    rgba[..., 3] = 255
    rgba[:, :8] = (255, 255, 255, 0)
    return Image.fromarray(rgba)


COMPOSITED = TRUTH * (np.arange(16) >= 8)
WIDE = GREY.astype(np.uint16) * 257
TWELVE = GREY.astype(np.uint16) * 16 + 7
DARK = np.add.outer(np.arange(24) * 5, np.arange(16) * 3)  # (24, 16), 0 to 160 of 4,095

GOOD = {
    "L": (saved(Image.fromarray(GREY)), TRUTH),
    "LA": (saved(Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)]))), TRUTH),
    "RGB": (saved(Image.fromarray(np.dstack([GREY] * 3))), TRUTH),
    "RGBA": (saved(_transparent()), COMPOSITED),
    "LA hidden": (saved(_transparent().convert("LA")), COMPOSITED),
    "P": (saved(Image.fromarray(np.dstack([GREY] * 3)).quantize(256)), TRUTH),
    "L tRNS": (saved(Image.fromarray(GREY), transparency=int(GREY[5, 5])), np.where(GREY == GREY[5, 5], 0, TRUTH)),
    "bmp": (saved(Image.fromarray(GREY), "BMP"), TRUTH),
    "tiff": (saved(Image.fromarray(GREY), "TIFF"), TRUTH),
    "tiff lzw": (saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"), TRUTH),
    "tiff 16": (saved(Image.fromarray(WIDE), "TIFF"), TRUTH),
    "tiff float": (saved(Image.fromarray(TRUTH.astype(np.float32)), "TIFF"), TRUTH),
    "16 bit": (saved(Image.fromarray(WIDE)), TRUTH),
    "16 bit by hand": (png(WIDE, 16), TRUTH),
    "16 bit RGB": (png(np.dstack([WIDE] * 3), 16, 2), TRUTH),
    "16 bit LA": (png(np.dstack([WIDE, np.full_like(WIDE, 65535)]), 16, 4), TRUTH),
    "16 bit RGBA": (png(np.dstack([WIDE] * 3 + [np.full_like(WIDE, 65535)]), 16, 6), TRUTH),
    "12 bit sBIT low": (png(TWELVE, 16, extra=chunk(b"sBIT", b"\x0c")), TWELVE / 4095),
    "12 bit sBIT scaled": (png(TWELVE << 4 | TWELVE >> 8, 16, extra=chunk(b"sBIT", b"\x0c")), TWELVE / 4095),
    "12 bit sBIT low, dark": (png(DARK, 16, extra=chunk(b"sBIT", b"\x0c")), DARK / 4095),
    "12 bit sBIT shifted, dark": (png(DARK << 4, 16, extra=chunk(b"sBIT", b"\x0c")), DARK / 4095),
    "12 bit sBIT replicated, dark": (png(DARK << 4 | DARK >> 8, 16, extra=chunk(b"sBIT", b"\x0c")), DARK / 4095),
    "12 bit sBIT proportional, dark": (
        png(np.rint(DARK * 65535 / 4095).astype(int), 16, extra=chunk(b"sBIT", b"\x0c")),
        DARK / 4095,
    ),
    "12 bit without sBIT": (png(TWELVE, 16), TWELVE / 65535),
    "16 bit constant": (png(np.full((9, 9), 30000), 16), np.full((9, 9), 30000 / 65535)),
    "1 bit": (saved(Image.fromarray(GREY > 99)), (GREY > 99) * 1.0),
    "no IEND": (png(GREY, 8, end=False), TRUTH),
    "black": (png(np.zeros((8, 8)), 8), np.zeros((8, 8))),
    "white": (png(np.full((8, 8), 255), 8), np.ones((8, 8))),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_file_gives_its_picture(tmp_path, name):
    content, truth = GOOD[name]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    values = bc.read_image(path)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    # 8-bit grey scaled alike everywhere; a palette and 16-bit colour may round to 8 bits.
    np.testing.assert_allclose(values, truth, atol=1.01 / 255 if name in ("P", "LA hidden") else 2e-7)
    assert path.read_bytes() == content


def test_colour_becomes_rec_601_luma(tmp_path):
    rgb = np.zeros((10, 10, 3), np.uint8)
    rgb[..., 0], rgb[..., 1], rgb[..., 2] = 200, 100, 50
    (tmp_path / "x").write_bytes(saved(Image.fromarray(rgb)))
    assert read_image(tmp_path / "x")[0, 0] == pytest.approx((0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255, abs=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_named_png_is_read(tmp_path, mode):
    (tmp_path / "x.PNG").write_bytes(saved(Image.fromarray(GREY).convert("RGB").convert(mode), "JPEG", quality=100))
    np.testing.assert_allclose(read_image(tmp_path / "x.PNG"), TRUTH, atol=3 / 255)


def test_sixteen_bits_keep_order_and_mean(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).round().reshape(64, 64)
    (tmp_path / "x.png").write_bytes(png(values, 16))
    read = read_image(tmp_path / "x.png")
    assert (np.diff(read.ravel()) > 0).all()
    assert read.mean() == pytest.approx(values.mean() / 65535, abs=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "x.png").write_bytes(saved(Image.fromarray(GREY), exif=exif))
    turned = {
        1: TRUTH, 2: TRUTH[:, ::-1], 3: TRUTH[::-1, ::-1], 4: TRUTH[::-1], 5: TRUTH.T, 6: TRUTH[::-1].T,
        7: TRUTH[::-1, ::-1].T, 8: TRUTH[:, ::-1].T,
    }[orientation]  # fmt: skip
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), turned, atol=1e-6)


def test_orientation_is_applied_to_sixteen_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "x.png").write_bytes(saved(Image.fromarray(WIDE), exif=exif))
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), TRUTH[::-1].T, atol=1e-6)


NAMES = ["a b.png", "é手.png", "a\nb.png", '"><img src=x onerror=alert(1)>.png', "-rf.png", "..png", "$\\badcmd$.png"]
NAMES += ["n" * 251 + ".png", "nosuffix", "UPPER.PNG", os.fsdecode(b"\xff\xfe.png")]


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_is_read_and_said_on_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD["L"][0])
    np.testing.assert_allclose(read_image(path), TRUTH, atol=1e-6)
    path.write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.isprintable()
    message.encode("utf-8")
    assert caught.value.path == path
    assert caught.value.reason in message


def _bomb(width: int, height: int, extra: bytes = b"") -> bytes:
    squeeze = zlib.compressobj(9)
    lines = squeeze.compress(bytes(min(height * (width // 8 + 1), 2**24))) + squeeze.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def _wrong_crc() -> bytes:
    content = bytearray(png(GREY, 8))
    content[content.index(b"IDAT") + 12] ^= 0x40
    return bytes(content)


def _only_crc_wrong() -> bytes:
    content = bytearray(png(GREY, 8))
    content[-16] ^= 0x40  # the last byte but three of IDAT's checksum, whose pixels are whole
    return bytes(content)


def _frames(kind: str) -> bytes:
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    return saved(first, kind, save_all=True, append_images=[second])


def _text_bomb() -> bytes:
    return png(GREY, 8, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27), 9)))


def _profile_bomb() -> bytes:
    return png(GREY, 8, extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**27), 9)))


BROKEN = {
    "nothing": (b"", "empty"),
    "a signature": (b"\x89PNG\r\n\x1a\n", "is (not|broken)"),
    "a header": (GOOD["L"][0][:40], "is (not|broken)"),
    "HTML": (b"<html><body>404</body></html>", "not a PNG"),
    "text": (b"hello world\n" * 50, "not a PNG"),
    "AppleDouble": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200), "not a PNG"),
    "half a PNG": (png(np.random.default_rng(0).integers(0, 255, (64, 64)), 8)[:2000], "broken"),
    "half a JPEG": (saved(Image.fromarray(GREY).resize((200, 200)), "JPEG")[:900], "broken"),
    "a wrong CRC": (_wrong_crc(), "broken"),
    "only the CRC wrong": (_only_crc_wrong(), "wrong checksum of chunk b'IDAT'"),
    "GIF": (saved(Image.fromarray(GREY), "GIF"), "not a PNG"),
    "PDF": (b"%PDF-1.4\n" + bytes(300), "not a PNG"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
    "several TIFF frames": (_frames("TIFF"), "several frames"),
    "animated PNG": (_frames("PNG"), "several frames"),
    "a wrong CRC of a side chunk": (png(GREY, 8, extra=chunk(b"tEXt", b"k\0v")[:-1] + b"?"), "broken"),
    "1 x 1": (png(np.zeros((1, 1)), 8), "too few"),
    "3 x 3": (png(np.zeros((3, 3)), 8), "too few"),
    "1 x 5000": (png(np.zeros((5000, 1)), 8), "too few|longer"),
    "5000 x 1": (png(np.zeros((1, 5000)), 8), "too few|longer"),
    "10 x 5000": (png(np.zeros((10, 5000)), 8), "longer"),
    "95 megapixels": (_bomb(9750, 9750), "more than the allowed"),
    "182 megapixels": (_bomb(13500, 13500), "more than the allowed"),
    "sides of 2^31": (_bomb(2**31 - 1, 2**31 - 1), "allowed|broken|not a PNG"),
    "NaN": (saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "NaN or infinite"),
    "infinity": (saved(Image.fromarray(np.full((9, 9), np.inf, np.float32)), "TIFF"), "NaN or infinite"),
    "floats beyond 1": (saved(Image.fromarray(np.full((9, 9), 300, np.float32)), "TIFF"), "scale them"),
    "32-bit integers": (saved(Image.fromarray(np.full((9, 9), 10**6, np.int32)), "TIFF"), "16 bits"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07payload\x94.", "not a PNG"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_file_is_refused_by_name_quickly_and_small(tmp_path, name):
    content, reason = BROKEN[name]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        _within_a_second_and_50_mb(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert path.read_bytes() == content


@pytest.mark.parametrize("make", [_text_bomb, _profile_bomb], ids=["zTXt", "iCCP"])
def test_a_bomb_in_the_metadata_does_no_harm(tmp_path, make):
    (tmp_path / "x.png").write_bytes(make())
    try:
        values = _within_a_second_and_50_mb(tmp_path / "x.png")
    except ImageError:
        return
    np.testing.assert_allclose(values, TRUTH, atol=1e-6)


def _within_a_second_and_50_mb(path):
    import resource

    tracemalloc.start()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        return read_image(path)
    finally:
        assert time.process_time() - begun < 1
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
        tracemalloc.stop()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_what_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "fifo.png")
    for name, reason in [
        ("folder.png", "not a regular file"),
        ("fifo.png", "not a regular file"),
        ("dangling.png", "No such file"),
        ("loop.png", "symbolic links"),
        ("absent.png", "No such file"),
    ]:
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)
    for path in ("/dev/zero", "/etc/passwd", "a\0b", ""):
        with pytest.raises(ImageError):
            read_image(path)


def test_a_link_to_an_image_is_followed(tmp_path):
    (tmp_path / "x.png").write_bytes(GOOD["L"][0])
    (tmp_path / "link").symlink_to(tmp_path / "x.png")
    np.testing.assert_allclose(read_image(tmp_path / "link"), TRUTH, atol=1e-6)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(GOOD["L"][0])
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(ImageError, match="Permission"):
        read_image(tmp_path / "x.png")


def test_a_permission_error_is_an_image_error(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(GOOD["L"][0])

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(tmp_path / "x.png")


def test_the_pixel_cap_is_an_argument(tmp_path):
    (tmp_path / "x.png").write_bytes(GOOD["L"][0])
    with pytest.raises(ImageError, match="16 x 24 pixels are more than the allowed 383"):
        read_image(tmp_path / "x.png", max_pixels=383)
    assert read_image(tmp_path / "x.png", max_pixels=384).shape == (24, 16)


def test_the_global_limit_of_pillow_is_never_touched(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    for content, _ in [*GOOD.values(), *BROKEN.values()]:
        (tmp_path / "x").write_bytes(content)
        try:
            read_image(tmp_path / "x")
        except ImageError:
            pass
    assert (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK) == before


def test_a_file_longer_than_any_such_image_is_refused_unread(tmp_path):
    (tmp_path / "x.png").write_bytes(GOOD["L"][0])
    os.truncate(tmp_path / "x.png", 2**40)
    with pytest.raises(ImageError, match="1099511627776 bytes are more"):
        read_image(tmp_path / "x.png")


def test_a_large_honest_image_is_read(tmp_path):
    Image.new("L", (6000, 5000), 51).save(tmp_path / "x.png")
    assert 6000 * 5000 < MAX_PIXELS
    assert read_image(tmp_path / "x.png").mean() == pytest.approx(0.2)


def test_no_mutation_breaks_the_reader(tmp_path):
    """Seeded: bits, bytes, insertions and cuts in every good file give a picture in [0, 1] or an ImageError."""
    rng = random.Random(0)
    path = tmp_path / "x.png"
    outcomes: dict[str, int] = {"read": 0, "refused": 0}
    for name, (content, _) in GOOD.items():
        for _ in range(15):
            data = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                kind = rng.randrange(4)
                if kind == 0:
                    data[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
                elif kind == 2:
                    data[at:at] = rng.randbytes(rng.randint(1, 16))
                elif len(data) > 20:
                    del data[at + 1 :]
            path.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()[:8]
            try:
                values = read_image(path)
            except ImageError:
                outcomes["refused"] += 1
                continue
            outcomes["read"] += 1
            assert values.ndim == 2, (name, digest)
            assert values.min() >= 0, (name, digest)
            assert values.max() <= 1, (name, digest)
    assert min(outcomes.values()) > 20


def test_threads_leave_the_callers_warnings_as_they_were(tmp_path):
    import warnings
    from concurrent.futures import ThreadPoolExecutor

    (tmp_path / "x.png").write_bytes(GOOD["L"][0])
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, [tmp_path / "x.png"] * 300))
    assert list(warnings.filters) == before
