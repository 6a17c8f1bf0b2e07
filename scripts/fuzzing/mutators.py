"""Changes of a file that ``scripts/fuzz.py`` makes: of bytes, and of what the bytes mean."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tomllib
import warnings
import zipfile
import zlib
from collections.abc import Callable

Mutator = Callable[[bytes, random.Random], bytes]

ODD_VALUES = [
    None, True, 0, -1, 3, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), "", "x" * 300,
    "../../x", "\x00", "\ud800", "<b>", "{{7*7}}", [], {}, [[]], [None], {"a": 1}, ["x"], [1, 2], "nan", "full", "cpu",
]  # fmt: skip
ODD_BYTES = [
    b"\x00",
    b"\xff",
    b"\x80\x00\x00\x00",
    b"\x7f\xff\xff\xff",
    b"\n",
    b'"',
    b"{",
    b"]" * 9,
    b"[" * 20_000,
    b"1e999",
]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes of bits, bytes or chunks."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.randint(1, 64)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at : at + rng.choice([0, length])] = rng.choice(ODD_BYTES)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at // 2 : at // 2 + length]
        else:
            del data[at:]
    return bytes(data)


def mutate_tree(tree: object, rng: random.Random) -> object:
    """The same JSON-like tree with one node replaced, removed or given a neighbour."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(sorted(tree))
        changed = dict(tree)
        what = rng.random()
        if what < 0.1:
            del changed[key]
        elif what < 0.15:
            changed[str(rng.choice(ODD_VALUES))[:50]] = changed.pop(key)
        else:
            changed[key] = mutate_tree(tree[key], rng)
        return changed
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        return [*tree[:at], mutate_tree(tree[at], rng), *tree[at + rng.randrange(2) :]]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and rng.random() < 0.5:
        return rng.choice([tree + 1, tree - 1, -tree, tree * 1000, float(tree), str(tree)])
    return rng.choice(ODD_VALUES)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutate_tree(json.loads(content), rng)).encode()


def mutate_toml(content: bytes, rng: random.Random) -> bytes:
    import tomli_w

    try:
        return tomli_w.dumps(mutate_tree(tomllib.loads(content.decode()), rng)).encode("utf-8", "backslashreplace")
    except (TypeError, ValueError, AttributeError):
        return mutate_bytes(content, rng)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is changed as JSON, with the length that belongs to it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.7:
        ours = json.loads(header["__metadata__"]["bayescam"])
        header["__metadata__"]["bayescam"] = json.dumps(mutate_tree(ours, rng))
    elif rng.random() < 0.5:
        names = [name for name in header if name != "__metadata__"]
        a, b = rng.choice(names), rng.choice(names)
        header[a], header[b] = header[b], header[a]
    else:
        header = mutate_tree(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutate_netcdf(content: bytes, rng: random.Random) -> bytes:
    """A NetCDF file with an object or attribute removed, renamed or replaced by something else."""
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "a") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(names)
            if name not in file:
                continue
            kind = rng.randrange(4)
            if kind == 0:
                del file[name]
            elif kind == 1:
                file.move(name, f"{name}_{rng.randrange(9)}")
            elif kind == 2 and file[name].attrs:
                key = rng.choice(sorted(file[name].attrs))
                del file[name].attrs[key]
                file[name].attrs[key] = rng.choice([-1, 2.5, "x", "\ud800".encode("utf-8", "surrogatepass"), [1, 2]])
            else:
                parent = name.rpartition("/")[0]
                del file[name]
                value = rng.choice([3, "text", [1.5], [[1, 2], [3, 4]], float("nan"), [], ["a", "b"], 10**15])
                file[f"{parent}/{name.rpartition('/')[2]}"] = value
    return buffer.getvalue()


def mutate_png(content: bytes, rng: random.Random) -> bytes:
    """A PNG whose chunks are changed, dropped or doubled, with the checksums that belong to them."""
    if not content.startswith(b"\x89PNG"):
        return mutate_bytes(content, rng)
    chunks, at = [], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.randint(1, 2)):
        index = rng.randrange(len(chunks))
        kind, body = chunks[index]
        what = rng.randrange(5)
        if what == 0:
            chunks.insert(index, chunks[index])
        elif what == 1 and len(chunks) > 1:
            del chunks[index]
        elif what == 2:
            chunks.insert(rng.randrange(len(chunks)), (rng.choice(PNG_KINDS), rng.randbytes(rng.randrange(20))))
        elif kind == b"IDAT" and what == 3:
            chunks[index] = kind, zlib.compress(rng.randbytes(rng.randrange(5000)))
        else:
            chunks[index] = kind, mutate_bytes(body, rng)
    return content[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


PNG_KINDS = (b"tRNS", b"PLTE", b"sBIT", b"eXIf", b"acTL", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"IDAT", b"pHYs")


def mutate_gzip(content: bytes, rng: random.Random) -> bytes:
    """A .tar.gz whose tar is changed; a header that was hit gets the checksum that belongs to it."""
    if not content.startswith(b"\x1f\x8b"):
        return mutate_bytes(content, rng)
    data = bytearray(gzip.decompress(content))
    for _ in range(rng.randint(1, 3)):
        header = 512 * rng.randrange(max(1, len(data) // 512))
        start, end = rng.choice(TAR_FIELDS)
        value = rng.choice([rng.randbytes(end - start), rng.choice(TAR_VALUES)])[: end - start]
        data[header + start : header + start + len(value)] = value
        if header + 512 <= len(data):
            block = data[header : header + 148] + b" " * 8 + data[header + 156 : header + 512]
            data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    return gzip.compress(bytes(data), mtime=0)


TAR_FIELDS = ((0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (345, 500))
TAR_VALUES = (
    b"../../x\0",
    b"/x\0",
    b"a/\0",
    b"\xff" * 12,
    b"\x80" + b"\0" * 11,
    b"77777777777\0",
    b"2",
    b"L",
    b"x",
    b"S",
    b"\0",
)


def mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """An archive with a member replaced, renamed, doubled or left out; .npz is one too."""
    if not content.startswith(b"PK"):
        return mutate_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        members = [(info.filename, packed.read(info)) for info in packed.infolist()]
    index = rng.randrange(len(members))
    name, body = members[index]
    what = rng.randrange(5)
    if what == 0:
        members[index] = rng.choice(["../x", "/x", name.upper(), name + "/", "a" * 300, "labels.npy", "y"]), body
    elif what == 1:
        members.insert(0, members[index])
    elif what == 2 and len(members) > 1:
        del members[index]
    elif name.endswith(".npy") and what == 3:
        members[index] = name, mutate_npy(body, rng)
    else:
        members[index] = name, mutate_bytes(body, rng)
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for member, content in members:
            packed.writestr(member, content)
    return buffer.getvalue()


def mutate_npy(content: bytes, rng: random.Random) -> bytes:
    """An .npy with another type, order or shape in its header, which keeps its length."""
    if not content.startswith(b"\x93NUMPY"):
        return mutate_bytes(content, rng)
    (length,) = struct.unpack("<H", content[8:10])
    header, body = content[10 : 10 + length].decode("latin-1"), content[10 + length :]
    for old, new in rng.sample(NPY_HEADERS, 2):
        header = header.replace(old, new, 1)
    header = header.rstrip("\n ").ljust(length - 1)[: length - 1] + "\n"
    return content[:10] + header.encode("latin-1", "replace") + body


NPY_HEADERS = [
    ("<f8", "|O"), ("<f8", "<c16"), ("<f8", "<U9"), ("<f8", "<f2"), ("<f8", "<M8[s]"), ("<i8", "<f8"), ("<i8", "|b1"),
    ("<i8", "|S8"), ("(", "(99999999999, "), ("(", "(-1, "), ("(", "(0, "), (", ", ", 1, "), ("False", "True"),
    ("shape", "shave"), ("}", ""), ("<u2", "<f4"),
]  # fmt: skip


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """Lines dropped, doubled, swapped, or with a piece between separators replaced."""
    lines = content.splitlines()
    for _ in range(rng.randint(1, 4)):
        if not lines:
            break
        index, what = rng.randrange(len(lines)), rng.randrange(5)
        if what == 0:
            del lines[index]
        elif what == 1:
            lines.insert(rng.randrange(len(lines)), lines[index])
        elif what == 2:
            other = rng.randrange(len(lines))
            lines[index], lines[other] = lines[other], lines[index]
        else:
            mark = rng.choice([b"/", b","])
            pieces = lines[index].split(mark)
            pieces[rng.randrange(len(pieces))] = rng.choice(PIECES)
            lines[index] = mark.join(pieces)
    return b"\n".join(lines)


PIECES = [
    b"", b".", b"..", b"train", b"valid", b"TRAIN", b"XR_HAND", b"XR_hand", b"XR_FOOT", b"patient00001", b"patient",
    b"study1_positive", b"study9", b"image1.png", b"image10.PNG", b"._image1.png", b"Hand", b"hand", b"CXR", b"x" * 250,
    b"\xff\xfe", b"=1", b'"', b"nan", b"-1", b"1e400", b"0x1", b"\x1b[31m", b"Thumbs.db", b"__MACOSX", b"manifest.csv",
]  # fmt: skip
