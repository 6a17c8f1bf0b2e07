"""Patients never cross: by hash, stable when data grow, official splits honoured, planted overlaps caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bayescam.data.dataset import Radiograph, RadiographDataset
from bayescam.data.split import SplitError, assert_disjoint, equal_across_parts, split_by_patient


class _Source:
    """Content is the study's name."""

    def key(self, record):
        return str(record.study)

    def recipe(self):
        return None


def _data(num: int, classes: int = 3, official: str | None = None, patients: bool = True) -> RadiographDataset:
    records = tuple(
        Radiograph(
            f"{i:05d}", i % classes, f"p{i // 2}" if patients else None, study=f"content{i // 2}", split=official
        )
        for i in range(num)
    )
    return RadiographDataset("x", tuple("abcdef"[:classes]), records, source=_Source())


def _parts_of(dataset, parts):
    return dict(zip(dataset.groups(), parts, strict=True))


@pytest.mark.parametrize("patients", [True, False])
def test_a_patient_or_a_content_stands_on_one_side(patients):
    dataset = _data(900, patients=patients)
    parts = split_by_patient(dataset, seed=0)
    for group in set(dataset.groups()):
        assert len({p for g, p in zip(dataset.groups(), parts, strict=True) if g == group}) == 1
    assert_disjoint(dataset, parts)
    shares = [np.mean(parts == part) for part in ("train", "valid", "test")]
    np.testing.assert_allclose(shares, [0.65, 0.15, 0.2], atol=0.06)


def test_patients_stay_where_they_were_when_data_grow_shrink_or_turn():
    small, large = _data(300), _data(3000)
    before, after = _parts_of(small, split_by_patient(small, seed=1)), _parts_of(large, split_by_patient(large, seed=1))
    assert {group: after[group] for group in before} == before
    turned = large.select(np.random.default_rng(0).permutation(3000))
    assert _parts_of(turned, split_by_patient(turned, seed=1)) == after


def test_the_seed_decides():
    dataset = _data(900)
    first, second = split_by_patient(dataset, seed=0), split_by_patient(dataset, seed=1)
    assert (first != second).mean() > 0.3
    np.testing.assert_array_equal(first, split_by_patient(dataset, seed=0))


def test_a_patient_under_several_labels_stays_whole():
    dataset = _data(600)
    moved = replace(dataset, records=tuple(replace(r, patient=f"p{i % 150}") for i, r in enumerate(dataset.records)))
    parts = split_by_patient(moved, seed=0)
    assert len(set(zip(moved.patients, parts, strict=True))) == 150


def test_the_official_test_part_is_honoured_and_a_valid_part_taken_from_train():
    dataset = _data(900, official="train")
    records = tuple(replace(r, split="test") if i >= 700 else r for i, r in enumerate(dataset.records))
    parts = split_by_patient(replace(dataset, records=records), seed=0)
    assert (parts[700:] == "test").all()
    assert not (parts[:700] == "test").any()
    assert 0.08 < np.mean(parts[:700] == "valid") < 0.22
    whole = tuple(replace(r, split="valid") if i < 100 else r for i, r in enumerate(records))
    kept = split_by_patient(replace(dataset, records=whole), seed=0)
    assert kept.tolist() == [r.split for r in whole]


@pytest.mark.parametrize("patients", [True, False])
def test_a_planted_overlap_is_caught(patients):
    dataset = _data(300, patients=patients)
    parts = split_by_patient(dataset, seed=0)
    shared = int(np.flatnonzero(parts[::2] == "train")[0]) * 2
    parts[shared] = "test"
    with pytest.raises(SplitError, match=rf"(patient|content) of 0*{shared + 1} is in both test and train"):
        assert_disjoint(dataset, parts)


def test_a_planted_overlap_in_an_official_split_is_caught():
    dataset = _data(300, official="train")
    records = [replace(r, split="test") if i >= 200 else r for i, r in enumerate(dataset.records)]
    records[7] = replace(records[7], patient="p140")
    with pytest.raises(SplitError, match="is in both train and test"):
        split_by_patient(replace(dataset, records=tuple(records)), seed=0)


def test_half_an_official_split_is_refused():
    dataset = _data(30, official="train")
    records = (replace(dataset.records[0], split=None), *dataset.records[1:])
    with pytest.raises(SplitError, match="some images have an official split"):
        split_by_patient(replace(dataset, records=records), seed=0)
    with pytest.raises(SplitError, match="no test part"):
        split_by_patient(dataset, seed=0)


@pytest.mark.parametrize("num", [3, 6])
def test_few_patients_are_an_error_with_the_way_out(num):
    for seed in range(5):
        with pytest.raises(SplitError, match=r"class '\w' \(\d images\) is left without a \w+ image; add patients"):
            split_by_patient(_data(num), seed=seed)


def test_a_class_of_one_patient_is_named():
    dataset = _data(600, classes=2)
    records = tuple(replace(r, patient="only") if r.label == 1 else r for r in dataset.records)
    with pytest.raises(SplitError, match="class 'b'"):
        split_by_patient(replace(dataset, records=records), seed=0)


def test_mixed_groups_use_the_patient_where_it_is_known():
    dataset = _data(4, classes=2)
    records = (replace(dataset.records[0], patient=None), *dataset.records[1:])
    assert replace(dataset, records=records).groups() == ["content content0", "p0", "p1", "p1"]


def test_equal_content_under_several_patients_is_found_where_it_crosses():
    dataset = _data(6)
    assert equal_across_parts(dataset, np.array(["train", "train", "valid", "valid", "test", "test"])) == []
    twin = replace(dataset.records[5], study="content0")
    dataset = replace(dataset, records=(*dataset.records[:5], twin))
    assert equal_across_parts(dataset, np.array(["train"] * 4 + ["test"] * 2)) == [[0, 1, 5]]
    assert equal_across_parts(dataset, np.array(["train"] * 6)) == []
