"""Pseudonyms: one a patient, the same for the same data, and of no use to who has not the data."""

from __future__ import annotations

from dataclasses import replace

from bayescam.data.dataset import Radiograph, RadiographDataset
from bayescam.data.pseudonyms import pseudonyms


class _Source:
    def key(self, record):
        return f"content of {record.study}"


def _data(patients, contents="abcdef"):
    records = tuple(
        Radiograph(f"{i}.png", 0, patient, study=content)
        for i, (patient, content) in enumerate(zip(patients, contents, strict=False))
    )
    return RadiographDataset("x", ("hand", "wrist"), records, source=_Source())


def test_one_a_patient_and_none_for_nobody():
    found = pseudonyms(_data(["p1", "p2", None, "p1", "\udcff", ""]))
    assert found[0] == found[3]
    assert found[2] == ""
    assert len(set(found)) == 5
    assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in found if name)


def test_the_same_data_give_the_same_in_any_order_and_other_images_give_others():
    dataset = _data(["p1", "p2", "p3"])
    turned = replace(dataset, records=dataset.records[::-1])
    assert pseudonyms(turned) == pseudonyms(dataset)[::-1]
    assert pseudonyms(replace(dataset, name="other")) == pseudonyms(dataset)
    assert not set(pseudonyms(_data(["p1", "p2", "p3"], "uvw"))) & set(pseudonyms(dataset))
