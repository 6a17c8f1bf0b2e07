"""What ArviZ's versions do differently comes out alike."""

from __future__ import annotations

import arviz as az
import numpy as np
import pytest
import torch
import xarray as xr

import bayescam as bc
from bayescam.diagnose.arviz_compat import get_dataset, group_names, psis

CLASSES = ["hand", "label", "wrist"]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 50, 3, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    return bc.to_inference_data(bc.Draws(weight, bias), classes=CLASSES, prior_precision=1.0)


def test_summary_is_the_table_of_arviz(data):
    table = bc.summary(data)
    assert len(table) == 2 * (3 * 4 + 3)
    bias = get_dataset(data, "posterior")["bias"]
    named = az.summary(bias.rename(label="part").to_dataset(), round_to="none")
    ours = bc.summary(data, "bias", round_to="none")
    assert list(ours.index) == list(named.index) == [f"bias[{name}]" for name in CLASSES]
    assert list(ours.columns) == list(named.columns)
    np.testing.assert_allclose(ours.to_numpy(float), named.to_numpy(float))
    np.testing.assert_allclose(ours["mean"].to_numpy(float), bias.mean(("chain", "draw")))


@pytest.mark.parametrize("kind", ["all", "stats", "diagnostics"])
def test_summary_passes_on_what_az_summary_takes(data, kind):
    table = bc.summary(data, ["weight", "bias"], kind=kind, coords={"label": ["hand", "wrist"]}, round_to=3)
    assert len(table) == 2 * 4 + 2
    assert ("mean" in table) == (kind != "diagnostics")
    assert ("r_hat" in table) == (kind != "stats")
    one = bc.summary(data, "ght_c", filter_vars="like", coords={"label": ["wrist"], "feature": [2]})
    assert list(one.index) == ["weight_centred[wrist, 2]"]


def test_summary_reads_every_group(data):
    table = bc.summary(data, ["bias"], group="prior", kind="stats", round_to="none")
    prior = get_dataset(data, "prior")
    np.testing.assert_allclose(table["mean"].to_numpy(float), prior["bias"].mean(("chain", "draw")))
    assert list(bc.summary(data, group="log_prior", kind="stats").index) == ["theta"]
    again = bc.summary(prior[["bias"]], kind="stats", round_to="none")
    np.testing.assert_array_equal(again.to_numpy(float), table.to_numpy(float))


def test_summary_keeps_the_dimension_where_it_returns_a_dataset(data):
    table = bc.summary(data, ["weight"], fmt="xarray", kind="stats")
    assert isinstance(table, xr.Dataset)
    assert {"label", "feature"} <= set(table["weight"].dims)
    assert list(table["label"].values) == CLASSES
    assert "label_" not in bc.summary(data, ["bias"], fmt="long", kind="stats", round_to="none")


def test_summary_names_the_variable_that_is_not_there(data):
    with pytest.raises(KeyError, match="nothing"):
        bc.summary(data, ["nothing"])


def test_summary_names_what_it_cannot_summarise(data):
    with pytest.raises(ValueError, match="group is 'nope'; idata has posterior"):
        bc.summary(data, group="nope")
    for nothing in (None, {}, bc.Draws(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2))):
        with pytest.raises(TypeError, match="idata must be what to_inference_data returns"):
            bc.summary(nothing)
        with pytest.raises(TypeError, match="idata must be"):
            group_names(nothing)


def test_weights_that_span_thousands_of_nats_have_a_shape():
    for scale in (500, 1000):
        ratios = scale * np.random.default_rng(2).normal(size=(3, 1000))
        log_weights, shapes = psis(ratios)
        assert (shapes > 1).all()
        np.testing.assert_allclose(np.exp(log_weights).sum(1), 1)


def test_equal_weights_are_the_best_there_are():
    log_weights, shapes = psis(np.stack([np.full(200, -3.0), np.minimum(np.random.default_rng(0).normal(size=200), 0)]))
    np.testing.assert_allclose(log_weights[0], -np.log(200))
    np.testing.assert_allclose(np.exp(log_weights).sum(1), 1)
    assert shapes.tolist() == [0, 0]


@pytest.mark.skipif(int(az.__version__.split(".")[0]) < 1, reason="ArviZ 1.x only")
def test_arviz_takes_the_tree_once_its_dimension_has_another_name(data):
    with pytest.raises(ValueError, match="same name as an existing dimension"):
        az.summary(data)
    renamed = data.map_over_datasets(lambda d: d.rename(label="part") if "label" in d.dims else d)
    np.testing.assert_allclose(
        az.summary(renamed, round_to="none").to_numpy(float), bc.summary(data, round_to="none").to_numpy(float)
    )
