"""The letterbox is exact, there and back; the cache is keyed by content and never believed when it is broken."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bayescam.data import pixels as pixels_module
from bayescam.data import workers
from bayescam.data.dataset import open_dataset
from bayescam.data.image import ImageError
from bayescam.data.pixels import Geometry, letterboxed

SHAPES = [(128, 128), (512, 400), (89, 512), (300, 301), (17, 8), (8, 240), (64, 63), (40, 1200)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 128, 129])
def test_the_picture_is_scaled_alike_both_ways_and_centred(shape, size):
    geometry = Geometry.fit(*shape, size)
    assert max(geometry.scaled_height, geometry.scaled_width) == size
    exact = size / max(shape)
    assert abs(geometry.scaled_height - shape[0] * exact) <= 0.5 or geometry.scaled_height == 1
    assert abs(geometry.scaled_width - shape[1] * exact) <= 0.5 or geometry.scaled_width == 1
    below, right = size - geometry.top - geometry.scaled_height, size - geometry.left - geometry.scaled_width
    assert 0 <= below - geometry.top <= 1
    assert 0 <= right - geometry.left <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_picture_fills_its_place_and_nothing_else(shape):
    square, geometry = letterboxed(np.ones(shape, np.float32), 64)
    expected = np.zeros((64, 64))
    rows = slice(geometry.top, geometry.top + geometry.scaled_height)
    expected[rows, geometry.left : geometry.left + geometry.scaled_width] = 65535
    np.testing.assert_array_equal(square, expected)


def test_no_resampling_where_none_is_needed():
    image = np.random.default_rng(0).random((48, 64), np.float32)
    square, geometry = letterboxed(image, 64)
    np.testing.assert_array_equal(square[8:56], np.round(image * 65535))
    maps = torch.zeros(2, 3, 64, 64)
    maps[..., 8:56, :] = torch.from_numpy(image)
    assert torch.equal(geometry.from_square(maps), torch.from_numpy(image).expand(2, 3, 48, 64))


@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (96, 128), (256, 64), (50, 30)])
@pytest.mark.parametrize("place", [(0.2, 0.3), (0.5, 0.5), (0.9, 0.1), (0.75, 0.95)])
def test_one_hot_pixel_lands_where_it_should_and_comes_back(shape, place):
    row, column = int(place[0] * shape[0]), int(place[1] * shape[1])
    image = np.zeros(shape, np.float32)
    image[row, column] = 1
    geometry = Geometry.fit(*shape, 64)
    square = geometry.to_square(image)
    scale = 64 / max(shape)
    seen = np.array(np.unravel_index(square.argmax(), square.shape))
    expected = np.array([geometry.top + (row + 0.5) * scale - 0.5, geometry.left + (column + 0.5) * scale - 0.5])
    assert np.abs(seen - expected).max() <= 0.5 + 1e-6 + max(0, scale - 1)
    back = geometry.from_square(torch.from_numpy(square)).numpy()
    assert back.shape == shape
    found = np.unravel_index(back.argmax(), shape)
    assert np.abs(np.array(found) - (row, column)).max() <= max(1, round(1 / scale))


@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (512, 400), (40, 64)])
def test_a_ramp_survives_the_way_there_and_back(shape):
    """A linear picture is a fixed point of bilinear resampling, off by nothing away from the border."""
    image = np.add.outer(np.linspace(0.1, 0.5, shape[0]), np.linspace(0, 0.4, shape[1])).astype(np.float32)
    geometry = Geometry.fit(*shape, 64)
    back = geometry.from_square(torch.from_numpy(geometry.to_square(image))).numpy()
    edge = 2 * max(1, max(shape) // 64) + 1
    np.testing.assert_allclose(back[edge:-edge, edge:-edge], image[edge:-edge, edge:-edge], atol=4e-3)


def test_maps_keep_their_leading_dims():
    geometry = Geometry.fit(100, 60, 32)
    assert geometry.from_square(torch.zeros(4, 7, 2, 32, 32)).shape == (4, 7, 2, 100, 60)
    assert geometry.from_square(torch.zeros(32, 32)).shape == (100, 60)


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (30 + i, 20), dtype=np.uint8)).save(tmp_path / f"data/{name}/{i}.png")
    return tmp_path / "data"


def test_pixels_are_the_letterboxed_images(folder, tmp_path):
    dataset = open_dataset(folder)
    found = dataset.pixels(32, cache=tmp_path / "cache", progress=False)
    assert found.images.shape == (8, 32, 32)
    assert len(found) == 8
    for i in range(8):
        square, geometry = letterboxed(dataset.image(i), 32)
        np.testing.assert_array_equal(found.images[i], square)
        assert found.geometry[i] == geometry
    batch = found.batch([3, 0])
    assert batch.shape == (2, 1, 32, 32)
    np.testing.assert_allclose(batch[1, 0], found.images[0] / 65535, atol=1e-7)


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_the_number_of_workers_changes_nothing(folder, tmp_path, num_workers):
    dataset = open_dataset(folder)
    first = dataset.pixels(32, cache=tmp_path / "1", progress=False)
    other = dataset.pixels(32, cache=tmp_path / "2", num_workers=num_workers, progress=False)
    np.testing.assert_array_equal(first.images, other.images)
    assert first.geometry == other.geometry


def test_the_cache_is_used_until_a_content_changes(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    before = open_dataset(folder).pixels(32, cache=cache, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr("bayescam.data.dataset.read_image", None)
        again = open_dataset(folder).pixels(32, cache=cache, progress=False)
    np.testing.assert_array_equal(before.images, again.images)
    assert before.geometry == again.geometry
    Image.new("L", (20, 30), 200).save(folder / "a/0.png")
    after = open_dataset(folder).pixels(32, cache=cache, progress=False)
    assert (after.images[0] != before.images[0]).any()
    np.testing.assert_array_equal(after.images[1:], before.images[1:])
    assert len(list((cache / "pixels").iterdir())) == 2
    assert not list(cache.rglob("*.partial*"))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no array", None])
@pytest.mark.parametrize("name", ["images.npy", "geometry.npy"])
def test_a_broken_cache_is_made_again(folder, tmp_path, name, content):
    before = open_dataset(folder).pixels(32, cache=tmp_path / "cache", progress=False)
    expected = np.array(before.images)
    file = next((tmp_path / "cache").rglob(name))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    again = open_dataset(folder).pixels(32, cache=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(again.images, expected)


def test_a_cache_of_pickles_is_never_opened(folder, tmp_path):
    open_dataset(folder).pixels(32, cache=tmp_path / "cache", progress=False)
    file = next((tmp_path / "cache").rglob("geometry.npy"))
    np.save(file, np.array([{}] * 8, dtype=object), allow_pickle=True)
    assert open_dataset(folder).pixels(32, cache=tmp_path / "cache", progress=False).geometry[0].height == 30


def test_a_full_disk_is_an_error_and_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixels_module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        open_dataset(folder).pixels(32, cache=tmp_path / "cache", progress=False)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


# --- the phantom, drawn by processes ---------------------------------------------------------------------------------


def test_processes_draw_what_this_one_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("bayescam.data.dataset._WORTH_PROCESSES", 1)
    dataset = open_dataset("phantom", num=24, seed=3).select([5, 1, 23, 8, 2])
    one = dataset.pixels(64, num_workers=1, cache=tmp_path / "1", progress=False)
    two = dataset.pixels(64, num_workers=2, cache=tmp_path / "2", progress=False)
    np.testing.assert_array_equal(one.images, two.images)
    assert one.geometry == two.geometry


def test_a_dead_worker_is_told_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr("bayescam.data.dataset._WORTH_PROCESSES", 1)
    dataset = open_dataset("phantom", num=4)
    monkeypatch.setattr(dataset.source.__class__, "recipe", lambda self: {"num": -1, "seed": 0, "dials": {}})
    with pytest.raises(workers.WorkerError, match=r"ended early \(ValueError: num is -1.*--num-workers 1"):
        dataset.pixels(64, num_workers=2, cache=tmp_path, progress=False)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.slow
def test_a_plain_script_without_a_main_guard_uses_processes(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        "import bayescam as bc\n"
        "pixels = bc.open_dataset('phantom', num=320, seed=1).pixels(32, num_workers=2)\n"
        "print('drawn', len(pixels), int(pixels.images.max()) > 0)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout == "drawn 320 True\n", done.stderr


def test_processes_read_what_this_one_reads_and_name_what_they_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr("bayescam.data.dataset._WORTH_PROCESSES", 1)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            picture = rng.integers(0, 255, (20 + i, 31)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{i} é.png")
    dataset = open_dataset(tmp_path / "images")
    apart = dataset.pixels(16, num_workers=2, cache=tmp_path / "one", progress=False)
    alone = dataset.pixels(16, num_workers=1, cache=tmp_path / "two", progress=False)
    assert np.array_equal(apart.images, alone.images)
    assert apart.geometry == alone.geometry
    (tmp_path / "images/b/2 é.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"2 é\.png: is not a PNG"):
        open_dataset(tmp_path / "images").pixels(16, num_workers=2, cache=tmp_path / "three", progress=False)
