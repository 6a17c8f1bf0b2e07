"""Localisation metrics against scikit-learn and hand counts, and against the traps: empty masks, dead maps, ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from sklearn.metrics import average_precision_score

from bayescam.explain.baselines import centre_gaussian, edges, random_cam
from bayescam.explain.localise import (
    METRICS,
    average_precision,
    bootstrap_mean,
    energy,
    hit,
    iou,
    is_flat,
    otsu,
    rank_accuracy,
    score,
)


def _mask(*cells: tuple[int, int], size: int = 6) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    for row, column in cells:
        mask[0, row, column] = True
    return mask


def test_average_precision_is_scikit_learns_with_and_without_ties():
    maps = torch.randn(8, 9, 9, dtype=torch.float64)
    maps[4:] = maps[4:].round()
    masks = torch.rand(8, 9, 9) < 0.3
    expected = [
        average_precision_score(m.flatten().numpy(), v.flatten().numpy()) for m, v in zip(masks, maps, strict=True)
    ]
    assert average_precision(maps, masks).tolist() == pytest.approx(expected)


def test_hits_misses_and_tolerance():
    maps = torch.zeros(1, 6, 6)
    maps[0, 1, 4] = 2
    assert hit(maps, _mask((1, 4), (0, 0))).tolist() == [1]
    assert hit(maps, _mask((1, 1))).tolist() == [0]
    assert hit(maps, _mask((3, 2)), tolerance=2).tolist() == [1]
    assert hit(maps, _mask((4, 2)), tolerance=2).tolist() == [0]
    maps[0, 5, 5] = 2
    assert hit(maps, _mask((1, 4))).tolist() == [0.5]


def test_energy_counts_positive_values_only():
    maps = torch.tensor([[[3.0, -5.0], [1.0, 0.0]]])
    mask = torch.tensor([[[True, True], [False, False]]])
    assert energy(maps, mask).tolist() == [0.75]
    assert energy(-maps.abs(), mask).tolist() == [0]


def test_iou_at_a_threshold_and_at_otsus():
    maps = torch.zeros(1, 6, 6)
    maps[0, :3] = 1
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 2:4] = True
    assert iou(maps, mask, threshold=0.5).tolist() == pytest.approx([6 / 24])
    assert iou(maps, mask).tolist() == pytest.approx([6 / 24])
    assert iou(maps, mask, threshold=torch.tensor([2.0])).tolist() == [0]


def test_otsu_separates_two_lumps():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(50, generator=generator) * 0.3, torch.randn(50, generator=generator) * 0.3 + 5
    maps = torch.cat([low, high]).reshape(1, 10, 10)
    assert low.max() <= otsu(maps)[0] <= high.min()


def test_rank_accuracy_by_hand_with_ties_in_proportion():
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    assert rank_accuracy(maps, torch.tensor([[[True, False], [True, False]]])).tolist() == [0.5]
    tied = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]])
    assert rank_accuracy(tied, torch.tensor([[[True, True], [False, False]]])).tolist() == pytest.approx(
        [(1 + 1 / 3) / 2]
    )


@pytest.mark.parametrize("metric", METRICS)
def test_empty_and_full_masks_are_not_scored_and_dead_maps_never_win(metric):
    maps = torch.rand(3, 6, 6)
    masks = torch.stack([torch.zeros(6, 6, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool), _mask((1, 1))[0]])
    assert torch.isnan(METRICS[metric](maps, masks)).tolist() == [True, True, False]
    dead = METRICS[metric](torch.zeros(1, 6, 6), _mask((1, 1)))
    assert float(dead) <= 1 / 36 + 1e-6  # AUPRC of a map that says nothing is the mask's share, all else is a miss


@pytest.mark.parametrize("metric", METRICS)
def test_the_truth_itself_scores_one_and_images_do_not_mix(metric):
    masks = torch.rand(5, 8, 8) < 0.4
    torch.testing.assert_close(METRICS[metric](masks.double(), masks), torch.ones(5, dtype=torch.float64))
    maps = torch.randn(5, 8, 8, dtype=torch.float64)
    whole = METRICS[metric](maps, masks)
    for n in range(5):
        torch.testing.assert_close(METRICS[metric](maps[n : n + 1], masks[n : n + 1]), whole[n : n + 1])


def test_a_table_has_intervals_counts_and_baselines():
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(40, 8, 8, generator=generator) < 0.3
    masks[0] = False
    maps = masks.double() + 0.8 * torch.randn(40, 8, 8, generator=generator, dtype=torch.float64)
    maps[5] = 1.0
    table = score(
        {"cam": maps, "centre": centre_gaussian(40, (8, 8))}, masks, patients=[str(n // 2) for n in range(40)]
    )
    rows = {(row.maps, row.metric): row for row in table}
    assert len(rows) == 2 * len(METRICS)
    best, null = rows["cam", "AUPRC"], rows["centre", "AUPRC"]
    assert best.low < best.mean < best.high
    assert best.low > null.high
    assert (best.num, best.skipped, best.dead, null.dead) == (39, 1, 1, 0)
    empty = score({"cam": maps}, torch.zeros_like(masks))[0]
    assert math.isnan(empty.mean)
    assert empty.num == 0


def test_bootstrap_over_patients_is_wider_than_over_images():
    """Copies of an image tell nothing new: with every image doubled the interval over patients stays as it was."""
    maps, masks = torch.randn(30, 8, 8, dtype=torch.float64), torch.rand(30, 8, 8) < 0.3
    twice = (maps.repeat_interleave(2, 0), masks.repeat_interleave(2, 0))
    single = score({"cam": maps}, masks, patients=[str(n) for n in range(30)])[4]
    doubled = score({"cam": twice[0]}, twice[1], patients=[str(n // 2) for n in range(60)])[4]
    careless = score({"cam": twice[0]}, twice[1])[4]
    assert (doubled.high - doubled.low) == pytest.approx(single.high - single.low)
    assert (careless.high - careless.low) < 0.85 * (doubled.high - doubled.low)


@pytest.mark.parametrize("count", [2, 6])
def test_the_interval_of_a_mean_is_students_and_one_patient_has_none(count):
    values = np.random.default_rng(0).normal(size=count)
    low, high = bootstrap_mean(values, np.arange(count), 0.9, num_resamples=200_000)
    assert low <= values.mean() <= high
    if count == 6:
        half = student.ppf(0.95, count - 1) * values.std(ddof=1) / math.sqrt(count)
        assert high - low == pytest.approx(2 * half, rel=0.15)
    for few in (values[:0], values[:1]):
        assert all(map(math.isnan, bootstrap_mean(few, np.arange(len(few)))))
    assert all(map(math.isnan, bootstrap_mean(values, np.zeros(count))))


def test_baselines_know_nothing_of_the_network():
    bell = centre_gaussian(2, (5, 7))
    assert np.unravel_index(int(bell[0].argmax()), (5, 7)) == (2, 3)
    image = torch.zeros(1, 6, 6)
    image[:, :, 3:] = 1
    slope = edges(image)[0]
    assert bool((slope[:, 2:4] > 0).all())
    assert float(slope[:, [0, 5]].max()) == 0
    maps = torch.rand(3, 4, 2, 2)
    torch.testing.assert_close(random_cam(maps, seed=3), random_cam(maps, seed=3))
    assert not torch.equal(random_cam(maps, seed=3), random_cam(maps, seed=4))
    assert is_flat(torch.ones(1, 2, 2)).tolist() == [True]


def test_wrong_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        hit(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean"):
        energy(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="NaN"):
        iou(torch.full((1, 2, 2), math.nan), torch.ones(1, 2, 2, dtype=torch.bool))
    masks = torch.eye(3, dtype=torch.bool).expand(2, 3, 3)
    with pytest.raises(ValueError, match="tolerance is -1"):
        hit(torch.rand(2, 3, 3), masks, tolerance=-1)
    with pytest.raises(ValueError, match="patients has 1 entries and there are 2 images"):
        score({"cam": torch.rand(2, 3, 3)}, masks, patients=["one"])
