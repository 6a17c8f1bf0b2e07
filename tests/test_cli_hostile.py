"""Wrong calls of every command: one line that names the file or option, status 1 or 2, nothing lost, no traceback."""

from __future__ import annotations

import json
import os
import shlex

import numpy as np
import pytest

from bayescam.cli import main

CALLS = """
1 absent: no such folder           | run --data absent --out o
1 is not a folder                  | run --data file --out o
1 only one class                   | run --data one --out o
1 no images in it                  | run --data empty --out o
1 no such folder                   | run --data s3://bucket/images --out o
1 no such folder                   | run --data loop --out o
1 say where your copy lies         | run --data mura --out o
1 no train/XR_                     | run --data mura --root empty --out o
1 mednist: not at                  | run --data mednist --root empty --out o
1 has a header and no rows         | run --data header.csv --out o
1 no column 'path'                 | run --data columns.csv --out o
1 is empty                         | run --data empty.csv --out o
1 not a CSV file in UTF-8          | run --data binary.csv --out o
1 leads out of                     | run --data outside.csv --out o
1 2 of its 2 files are missing     | run --data missing.csv --out o
2 not a readable TOML              | run --config broken.toml --out o
2 not a readable TOML              | run --config empty --out o
2 did you mean train.epochs        | run --config unknown.toml --out o
2 train must be a table            | run --config type.toml --out o
2 preset 'fast' is unknown         | run --config preset.toml --out o
2 data.phantom_images must be      | run --config huge.toml --out o
2 data.limit must be at least 1    | run --limit -5 --out o
2 data.num_workers must be at most | run --num-workers 1000000 --out o
2 seed must be below               | run --seed 1000000000000 --out o
2 device must be auto, cpu or cuda | run --device tpu --out o
2 --device cuda:x: unknown; say    | run --device cuda:x --out o
2 --backbone                       | run --backbone os.system --out o
2 lies among the images            | run --data one --out one/hand/run
2 is a file                        | run --out file
1 cannot be written                | run --out file/below
1 cannot be written                | run --out loop/below
2 the folder is not empty          | run --out other
2 not that of a run                | run --out other --overwrite
2 unknown setting title            | run --out other --resume
2 not a run (thesis.tex)           | run --out full --overwrite
2 not a run (thesis.tex)           | run --out full --resume
1 is not a run folder              | predict a.png --run empty
1 is not a run folder              | predict a.png --run absent
1 is not a run folder              | predict a.png --run file
1 lists no files of a run          | predict a.png --run other
1 lists no files of a run          | explain a.png --run other --out o
1 lists no files of a run          | report other
1 lists no files of a run          | diagnose other
1 is not a run folder              | report loop
1 holds no posteriors              | diagnose empty
1 no such file                     | posterior --features absent.npz --out o
1 no such file                     | posterior --features empty --out o
1 not a whole .npz                 | posterior --features junk.npz --out o
1 has no array 'labels'            | posterior --features nolabels.npz --out o
1 features[3, 1] is nan            | posterior --features nan.npz --out o
1 labels hold one class only       | posterior --features oneclass.npz --out o
1 sum of their squares overflows   | posterior --features huge.npz --out o
1 ends in '.gz'                    | posterior --features f.csv.gz --out o
2 is a file                        | posterior --features good.npz --out file
2 not such a run                   | posterior --features good.npz --out full --overwrite
2 --prior-precision nan            | posterior --features good.npz --out o --prior-precision nan
2 --num-chains 0                   | posterior --features good.npz --out o --num-chains 0
2 exclude each other               | posterior --features good.npz --out o --resume --overwrite
1 absent: no such folder           | data check absent
1 say where your copy lies         | data check mura
2 --num-workers -1                 | data check one --num-workers -1
2 --num 0                          | data phantom --num 0 --out o
1 exists and is not an empty       | data phantom --num 2 --out full
2 exists; give another name        | data manifest one --out file
1 only one class                   | data manifest one --out o.csv
1 has no files to list             | data manifest phantom --out o.csv
"""
CASES = [
    (int(said[0]), said[2:].strip(), call.strip())
    for said, _, call in (c.partition("|") for c in CALLS.strip().splitlines())
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of things that are not what a command asks for."""
    root = tmp_path_factory.mktemp("hostile")
    for name in ("empty", "one/hand", "full", "other"):
        (root / name).mkdir(parents=True)
    (root / "one/hand/1.png").write_bytes(b"\x89PNG")
    (root / "loop").symlink_to(root / "loop")
    features, labels = np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 3
    holed = features.copy()
    holed[3, 1] = np.nan
    np.savez(root / "good.npz", features=features, labels=labels)
    np.savez(root / "nolabels.npz", features=features)
    np.savez(root / "nan.npz", features=holed, labels=labels)
    np.savez(root / "oneclass.npz", features=features, labels=0 * labels)
    np.savez(root / "huge.npz", features=features * 1e300, labels=labels)
    texts = {
        "file": "mine",
        "full/thesis.tex": "years of work",
        "other/config.toml": 'title = "nightly"',
        "other/run.json": json.dumps({"jobs": []}),
        "header.csv": "path,label\n",
        "columns.csv": "a,b\n1,2\n",
        "empty.csv": "",
        "missing.csv": "path,label\nx.png,hand\ny.png,elbow\n",
        "outside.csv": "path,label\n../x.png,hand\ny.png,elbow\n",
        "broken.toml": "preset = \n",
        "unknown.toml": "[train]\nepoch = 3\n",
        "type.toml": "train = 3\n",
        "preset.toml": 'preset = "fast"\n',
        "huge.toml": "[data]\nphantom_images = 100000000000000\n",
        "junk.npz": "PK\x03\x04junk",
        "f.csv.gz": "",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "binary.csv").write_bytes(b"\xff\xfe\0")
    return root


def _files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name != "posix", reason="POSIX links")
@pytest.mark.parametrize(("status", "words", "call"), CASES, ids=[call for _, _, call in CASES])
def test_a_wrong_call_is_one_line_and_loses_nothing(place, tmp_path, monkeypatch, capsys, status, words, call):
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAYESCAM_CACHE", str(tmp_path / "cache"))
    before = _files(place)
    arguments = [str(tmp_path / part) if part in ("o", "o.csv") else part for part in shlex.split(call)]
    assert main(arguments) == status
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("bayescam: ")
    assert words in said[0]
    assert "--debug shows where" not in said[0] or "overflows" in said[0]
    after = _files(place)
    assert {path: after.get(path) for path in before} == before
    assert not (tmp_path / "o/run.json").exists()
