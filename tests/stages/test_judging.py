"""What the table says beside its numbers."""

from __future__ import annotations

import pytest

from bayescam.stages.judging import _table


@pytest.mark.parametrize(
    ("temperature", "words"), [(0.01, "0.01, is at its lower"), (100.0, "100, is at its upper"), (1.5, None)]
)
def test_the_table_says_where_the_temperature_is_at_its_bound(temperature, words):
    head = _table({}, 90, "Intervals.", temperature).splitlines()[0]
    assert (words is None) == ("temperature" not in head)
    assert words is None or f"The temperature, {words} bound: the valid loss still falls there." in head
