"""Results show themselves in a notebook: briefly, and with every text escaped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bayescam as bc
from bayescam.notebook import html_table

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def results():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (60,), generator=generator)
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0)
    nuts = bc.sample_nuts(laplace, features, labels, num_chains=2, num_samples=20, num_warmup=20, progress=False)
    data = bc.to_inference_data(laplace, train=(features, labels), log_likelihood="train", num_samples=50)
    return {
        "laplace": replace(laplace, notes=(HOSTILE,)),
        "nuts": nuts,
        "draws": nuts.draws,
        "comparison": replace(bc.compare_posteriors(laplace, nuts, features, labels), words=HOSTILE),
        "cams": bc.CamPosterior(torch.rand(1, 2, 3, 3, dtype=torch.float64), laplace),
        "loo": bc.leave_one_out(data),
        "backbone": bc.Backbone("small", 3, image_size=32),
        "features": bc.Features(features.float(), labels, tuple(map(str, range(60))), torch.rand(60, 2, 3, 3)),
        "dataset": replace(bc.open_dataset("phantom", num=12, seed=0), name=HOSTILE),
    }


@pytest.mark.parametrize(
    "name", ["laplace", "nuts", "draws", "comparison", "cams", "loo", "backbone", "features", "dataset"]
)
def test_a_result_is_one_line_and_one_table(results, name):
    result = results[name]
    assert "\n" not in repr(result)
    assert len(repr(result)) < 600
    page = result._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 1
    assert "<script" not in page
    assert len(page) < 4000


def test_names_to_choose_from_are_the_public_ones():
    assert dir(bc) == sorted(bc.__all__)


def test_texts_are_data():
    page = html_table(HOSTILE, [(HOSTILE, 1)], header=(HOSTILE, "b & c"))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
    assert "b &amp; c" in page
