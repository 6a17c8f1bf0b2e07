"""Archives of strangers: everything hostile refuses the whole archive and leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import os
import random
import stat
import tarfile
import tracemalloc
import zipfile

import pytest

from bayescam.data.archive import ArchiveError, Limits, extract


def _tar(path, members, mode="w:gz"):
    """``members``: (name, bytes) or TarInfo or (TarInfo, bytes)."""
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, None)
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            tar.addfile(info, None if content is None else io.BytesIO(content))
    return path


def _special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _left_behind(folder, archive):
    return sorted(p.name for p in folder.iterdir() if p != archive)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_good_tar_arrives_whole(tmp_path, mode):
    folder = tarfile.TarInfo("a/")
    folder.type = tarfile.DIRTYPE
    archive = _tar(tmp_path / "x.tar", [folder, ("./a/1.txt", b"one"), ("a/b/2.txt", b""), ("c é手.txt", b"3")], mode)
    out = extract(archive, tmp_path / "out")
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == {"a/1.txt": b"one", "a/b/2.txt": b"", "c é手.txt": b"3"}
    assert _left_behind(tmp_path, archive) == ["out"]


def test_a_good_zip_arrives_whole(tmp_path):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/", "")
        packed.writestr("a/1.txt", "one")
    assert (extract(archive, tmp_path / "out") / "a/1.txt").read_text() == "one"


def test_modes_of_the_archive_are_not_taken(tmp_path):
    info = tarfile.TarInfo("run")
    info.size, info.mode = 1, 0o6777
    out = extract(_tar(tmp_path / "x.tar", [(info, b"x")], "w"), tmp_path / "out")
    assert not stat.S_IMODE((out / "run").stat().st_mode) & 0o6111


HOSTILE_NAMES = ["../x", "/x", "C:\\x", "C:/x", "a/../../x", "a/..", "..", "a\\..\\x", "x\ny", "x\x1b[31m", "a" * 300]
HOSTILE_NAMES += ["/".join("a" * 40), "x. ", "trailing./y"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_lead_out_are_refused(tmp_path, name):
    archive = _tar(tmp_path / "x.tar.gz", [("fine.txt", b"x"), (name, b"x")])
    with pytest.raises(ArchiveError, match="lead out"):
        extract(archive, tmp_path / "out")
    assert _left_behind(tmp_path, archive) == []


@pytest.mark.parametrize("name", ["../x", "/x", "C:\\x", "a/../../x", "x\0.png"])
def test_names_that_lead_out_of_a_zip_are_refused(tmp_path, name):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("fine.txt", "x")
        info = zipfile.ZipInfo("placeholder")
        info.filename = info.orig_filename = name
        packed.writestr(info, "x")
    with pytest.raises(ArchiveError, match="lead out"):
        extract(archive, tmp_path / "out")
    assert _left_behind(tmp_path, archive) == []


@pytest.mark.parametrize(
    "member",
    [
        _special("l", tarfile.SYMTYPE, "/etc/passwd"),
        _special("l", tarfile.SYMTYPE, "fine.txt"),
        _special("l", tarfile.LNKTYPE, "fine.txt"),
        _special("", tarfile.SYMTYPE, "/etc"),
        _special("l", tarfile.SYMTYPE, ""),
        _special("d", tarfile.CHRTYPE),
        _special("d", tarfile.BLKTYPE),
        _special("d", tarfile.FIFOTYPE),
        _special("d", tarfile.CONTTYPE),
    ],
    ids=lambda info: f"{info.type!r}-{info.linkname}",
)
def test_links_and_devices_are_refused(tmp_path, member):
    archive = _tar(tmp_path / "x.tar", [("fine.txt", b"x"), member], "w")
    with pytest.raises(ArchiveError, match=r"link|lead out"):
        extract(archive, tmp_path / "out")
    assert _left_behind(tmp_path, archive) == []


def test_a_link_in_a_zip_is_refused(tmp_path):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        info = zipfile.ZipInfo("l")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="link"):
        extract(archive, tmp_path / "out")


@pytest.mark.parametrize(
    "names", [("a", "a"), ("a", "A"), ("a", "a/b"), ("a/b", "a"), ("é", "e\u0301"), ("d/a", "D/A"), ("a", "./a")]
)
def test_duplicates_are_refused_whatever_the_file_system(tmp_path, names):
    archive = _tar(tmp_path / "x.tar", [(name, b"x") for name in names], "w")
    with pytest.raises(ArchiveError, match="twice"):
        extract(archive, tmp_path / "out")
    assert _left_behind(tmp_path, archive) == []


def test_many_members_are_refused(tmp_path):
    archive = _tar(tmp_path / "x.tar.gz", [(f"{i}", b"") for i in range(101)])
    with pytest.raises(ArchiveError, match="more than 100 members"):
        extract(archive, tmp_path / "out", limits=Limits(files=100))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_bomb_is_refused_without_filling_disk_or_memory(tmp_path, kind):
    archive = tmp_path / "bomb"
    zeros = bytes(60 * 2**20)
    if kind == "tar":
        _tar(archive, [("zeros", zeros)])
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("zeros", zeros)
    del zeros
    assert archive.stat().st_size < 2**17
    tracemalloc.start()
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        extract(archive, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
    assert _left_behind(tmp_path, archive) == []


def test_a_bomb_in_a_header_is_refused_without_filling_memory(tmp_path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    archive = tmp_path / "x.tar.gz"
    with gzip.open(archive, "wb", compresslevel=1) as stream:
        stream.write(info.tobuf())
        for _ in range(64):
            stream.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ArchiveError, match="header of"):
        extract(archive, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_a_total_limit_holds(tmp_path):
    archive = _tar(tmp_path / "x.tar", [(f"{i}", os.urandom(1000)) for i in range(10)], "w")
    with pytest.raises(ArchiveError, match="more than 5000 bytes"):
        extract(archive, tmp_path / "out", limits=Limits(total=5000))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_cut_archive_is_refused(tmp_path, keep):
    archive = _tar(tmp_path / "x.tar.gz", [(f"{i}", os.urandom(3000)) for i in range(10)])
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ArchiveError):
        extract(archive, tmp_path / "out")
    assert _left_behind(tmp_path, archive) == []


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x1f\x8b", b"<html>404</html>" * 99, bytes(10240)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    archive = tmp_path / "x"
    archive.write_bytes(content)
    with pytest.raises(ArchiveError):
        extract(archive, tmp_path / "out")


def test_an_existing_folder_is_never_written_into(tmp_path):
    archive = _tar(tmp_path / "x.tar", [("a", b"x")], "w")
    (tmp_path / "out").mkdir()
    extract(archive, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        extract(archive, tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_no_mutation_gets_out_or_breaks_the_reader(tmp_path, kind):
    whole = tmp_path / "whole"
    if kind == "zip":
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as packed:
            for i in range(5):
                packed.writestr(f"d/{i}.txt", f"{i}" * 300)
    else:
        _tar(whole, [(f"d/{i}.txt", b"%d" % i * 300) for i in range(5)], "w" if kind == "tar" else "w:gz")
    content = whole.read_bytes()
    rng = random.Random(0)
    folder = tmp_path / "work"
    folder.mkdir()
    for _ in range(150):
        data = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 4])] = rng.randbytes(rng.choice([1, 4, 16]))
        archive = folder / "x"
        archive.write_bytes(data)
        try:
            extract(archive, folder / "out", limits=Limits(total=2**20))
        except ArchiveError:
            assert not (folder / "out").exists()
        else:
            assert all(p.is_dir() or p.is_file() for p in (folder / "out").rglob("*"))
            import shutil

            shutil.rmtree(folder / "out")
        assert _left_behind(folder, archive) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole", "work"]
