"""Ready-made features: what is read, how it is split, and what is said about broken files."""

import io
import zipfile

import numpy as np
import pytest

from bayescam.data.feature_table import read_features
from bayescam.errors import FileFormatError


def arrays(n=30, d=4, k=3, dtype=np.float32):
    generator = np.random.default_rng(0)
    return {"features": generator.standard_normal((n, d)).astype(dtype), "labels": np.arange(n) % k}


def npz(folder, **held):
    path = folder / "f.npz"
    np.savez(path, **held)
    return path


def test_a_fifth_of_each_class_is_held_out_by_seed(tmp_path):
    held = arrays(n=60)
    path = npz(tmp_path, **held)
    a, b, c = read_features(path, seed=1), read_features(path, seed=1), read_features(path, seed=2)
    assert np.array_equal(a.test_rows, b.test_rows)
    assert not np.array_equal(a.test_rows, c.test_rows)
    assert np.bincount(a.test_labels).tolist() == [4, 4, 4]
    assert sorted([*a.rows, *a.test_rows]) == list(range(60))
    assert np.array_equal(a.features, held["features"][a.rows])
    assert np.array_equal(a.test_labels, held["labels"][a.test_rows])
    assert a.features.dtype == np.float32
    assert a.classes == ("0", "1", "2")


def test_given_test_arrays_are_used(tmp_path):
    held = arrays()
    path = npz(tmp_path, **held, test_features=held["features"][:3], test_labels=held["labels"][:3])
    table = read_features(path, seed=0)
    assert len(table.labels) == 30
    assert np.array_equal(table.test_features, held["features"][:3])
    assert np.array_equal(table.test_labels, [0, 1, 2])


def test_labels_may_be_words_or_any_numbers(tmp_path):
    held = arrays()
    words = np.array(["wrist", "elbow", "hand"])[held["labels"]]
    table = read_features(npz(tmp_path, features=held["features"], labels=words), seed=0)
    assert table.classes == ("elbow", "hand", "wrist")
    assert np.array_equal(np.array(table.classes)[table.labels], words[table.rows])
    numbers = np.array([10, 9, 2])[held["labels"]]
    table = read_features(npz(tmp_path, features=held["features"], labels=numbers.astype(float)), seed=0)
    assert table.classes == ("2", "9", "10")


@pytest.mark.parametrize("header", ["", "a,b,c,what\n"])
def test_csv_with_and_without_a_header(tmp_path, header):
    path = tmp_path / "f.csv"
    rows = "".join(f"{i},{i / 3!r},-1e-3,{'even' if i % 2 == 0 else 'odd'}\n" for i in range(20))
    path.write_text(header + rows)
    table = read_features(path, seed=0)
    assert table.features.shape[1] == 3
    assert len(table.labels) + len(table.test_labels) == 20
    assert table.features.dtype == np.float64
    assert np.array_equal(table.features[:, 0] % 2, table.labels)
    assert table.classes == ("even", "odd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("labels"), "has no array 'labels'"),
        (lambda a: a.update(test_features=a["features"]), "one of test_features and test_labels"),
        (lambda a: a.update(features=a["features"][:, 0]), r"features must be numbers \(N, D\)"),
        (lambda a: a.update(labels=a["labels"][:-1]), r"labels must be \(30,\)"),
        (lambda a: a.update(labels=a["labels"] + 0.5), "not whole numbers"),
        (lambda a: a.update(labels=np.zeros(30, int)), "one class only"),
        (lambda a: a.update(labels=np.r_[np.zeros(29, int), 1]), "class '1' has one row"),
        (lambda a: a["features"].__setitem__((3, 1), np.nan), r"features\[3, 1\] is nan"),
        (lambda a: a.update(test_features=a["features"][:2], test_labels=np.array([0, 7])), "'7', which labels does"),
        (lambda a: a.update(test_features=a["features"][:2, :2], test_labels=np.array([0, 1])), "test_features has 2"),
        (lambda a: a.update(labels=np.array([None] * 30, dtype=object)), "not a whole .npz of plain arrays"),
        (lambda a: a.update(labels=np.full(30, 0x110000, np.uint32).view("<U1")), "hold what is no text"),
        (lambda a: a.update(labels=np.full(30, "")), "one class only"),
    ],
)
def test_broken_npz(tmp_path, change, said):
    held = arrays()
    change(held)
    with pytest.raises(FileFormatError, match=said) as caught:
        read_features(npz(tmp_path, **held), seed=0)
    assert "f.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no row of numbers"),
        ("1\n2\n", "one column"),
        ("1,2,a\n1,b\n", "data row 2 has 2 columns, not 3"),
        ("1,2,a\n1,x,b\n", "data row 2: could not convert"),
        ("1,2,a\n1,inf,b\n", r"features\[1, 1\] is inf"),
        ("1,2," + "a" * 200_000, "is not a CSV file"),
    ],
)
def test_broken_csv(tmp_path, text, said):
    path = tmp_path / "f.csv"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=said):
        read_features(path, seed=0)


def test_absent_truncated_and_foreign_files(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        read_features(tmp_path / "none.npz", seed=0)
    path = npz(tmp_path, **arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(FileFormatError, match=r"not a whole \.npz"):
        read_features(path, seed=0)
    path.write_bytes(whole[:300] + b"\0" * 50 + whole[350:])
    with pytest.raises(FileFormatError, match=r"not a whole \.npz"):
        read_features(path, seed=0)
    for old, new in ((b"(30, ", b"'30, "), (b"(30, ", b"(999999999999, "), (b"'<f4'", b"'|O' ")):  # what a fuzz found
        with zipfile.ZipFile(path, "w") as packed:
            for name, array in arrays().items():
                stream = io.BytesIO()
                np.save(stream, array)
                content = stream.getvalue()
                packed.writestr(f"{name}.npy", content[:10] + content[10:].replace(old, new, 1)[: len(content) - 10])
        with pytest.raises(FileFormatError, match=r"not a whole \.npz"):
            read_features(path, seed=0)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("features", b"no array")
    with pytest.raises(FileFormatError, match="has no array 'features'"):
        read_features(path, seed=0)
    other = tmp_path / "f.parquet"
    other.write_bytes(b"x")
    with pytest.raises(FileFormatError, match=r"ends in '\.parquet'"):
        read_features(other, seed=0)


def test_an_npz_that_python_2_wrote_is_read_without_a_warning(tmp_path):
    """Whole numbers ended in L there; numpy reads them and warns."""
    held = arrays()
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as packed:
        for name, array in held.items():
            stream = io.BytesIO()
            np.save(stream, array)
            packed.writestr(f"{name}.npy", stream.getvalue().replace(b"(30,", b"(30L,").replace(b"} ", b"}", 1))
    read = read_features(tmp_path / "f.npz", seed=0)
    assert np.array_equal(read.features, held["features"][read.rows])


def test_patients_are_held_out_whole(tmp_path):
    held = arrays(n=120)
    owner = np.random.default_rng(1).integers(0, 30, 120)
    table = read_features(npz(tmp_path, **held, patients=owner), seed=3)
    assert table.test_patients.tolist() == [str(name) for name in owner[table.test_rows]]
    assert not set(owner[table.rows]) & set(owner[table.test_rows])
    assert sorted([*table.rows, *table.test_rows]) == list(range(120))
    assert (np.bincount(table.test_labels) >= 8).all()
    assert len(table.test_rows) < 60
    assert read_features(npz(tmp_path, **held), seed=3).test_patients is None


def test_a_column_of_a_csv_may_name_the_patients(tmp_path):
    path = tmp_path / "f.csv"
    rows = [f"{i / 7},p{i // 2},{i},{'ab'[i % 2]}" for i in range(20)]
    path.write_text("\n".join(["x,Patient,y,what", *rows]))
    table = read_features(path, seed=0)
    assert table.features.shape[1] == 2
    assert [f"p{i // 2}" for i in table.test_rows] == table.test_patients.tolist()


def test_patients_that_cannot_be_are_named(tmp_path):
    held = arrays()
    test = {"test_features": held["features"], "test_labels": held["labels"]}
    for more, said in (
        ({"patients": np.arange(29)}, r"patients must be whole numbers or words \(30,\)"),
        ({"patients": np.zeros(30)}, "patients must be whole numbers or words"),
        ({"patients": held["labels"]}, "class '0' has no row left once whole patients are held out"),
        ({**test, "patients": np.arange(30)}, "one of patients and test_patients"),
        (
            {**test, "patients": np.arange(30), "test_patients": np.arange(29, 59)},
            "patient '29' stands in patients and",
        ),
    ):
        with pytest.raises(FileFormatError, match=said):
            read_features(npz(tmp_path, **held, **more), seed=0)
