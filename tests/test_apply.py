"""A run applied to new images: whichever posterior its verdict lets speak, a Gaussian or NUTS's draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bayescam.apply import LoadedRun, explain_images, predict_images, prediction_table
from bayescam.backbone.network import Backbone
from bayescam.diagnose.compare import SPEAKERS
from bayescam.errors import FileFormatError
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts
from bayescam.posterior.predictive import predict_proba
from bayescam.report import cam_figures
from bayescam.report.wording import NAMES
from bayescam.stages.state import POSTERIORS, chosen_posterior, load_posterior

CLASSES = ("elbow", "hand", "wrist")


@pytest.fixture(scope="module")
def pieces():
    torch.manual_seed(0)
    backbone = Backbone("small", 3, image_size=32)
    features = torch.randn(60, backbone.head.in_features).relu()
    labels = torch.arange(60) % 3
    laplace = fit_laplace(features, labels, prior_precision=10.0)
    nuts = sample_nuts(laplace, features, labels, num_chains=2, num_samples=15, num_warmup=15, progress=False)
    return backbone, laplace, nuts


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "film.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    "verdict", [pytest.param(v, marks=pytest.mark.slow) if v in ("laplace", "undecided") else v for v in SPEAKERS]
)
def test_the_posterior_that_the_verdict_names_predicts_and_explains(pieces, image, tmp_path, verdict):
    backbone, laplace, nuts = pieces
    posterior = nuts.draws if verdict == "nuts" else laplace
    run = LoadedRun(backbone, posterior, CLASSES, SPEAKERS[verdict], verdict, "cpu")
    (found,) = predict_images(run, [image])
    draws = nuts.draws if verdict == "nuts" else laplace.sample(4000, seed=0)
    assert all(low <= p <= high for low, p, high in zip(found.lower, found.probabilities, found.upper, strict=True))
    assert found.to_dict()["verdict"] == verdict
    table = prediction_table([found])
    assert f"posterior: {NAMES[SPEAKERS[verdict]]};" in table
    assert ("nothing checked this posterior" in table) is (verdict == "undecided")
    (said,) = explain_images(run, [image], tmp_path / "out")
    assert (tmp_path / "out/cam-001.png").stat().st_size > 10_000
    assert CLASSES[int(np.argmax(found.probabilities))] in said
    if verdict == "nuts":
        from bayescam.apply import _squares

        with backbone.evaluating():
            phi = backbone.pool(backbone.maps(_squares(run, [image])[2])).double()
        np.testing.assert_allclose(found.probabilities, predict_proba(draws, phi)[0], rtol=1e-6)


def test_the_picture_has_the_interval_of_the_probability(pieces, image, tmp_path, monkeypatch):
    backbone, laplace, _ = pieces
    given, draw = {}, cam_figures.case_figure

    def noted(*args, **named):
        given.update(named)
        return draw(*args, **named)

    monkeypatch.setattr(cam_figures, "case_figure", noted)
    run = LoadedRun(backbone, laplace, CLASSES, "laplace_full", "laplace", "cpu")
    (found,) = predict_images(run, [image])
    list(explain_images(run, [image], tmp_path / "out", label="wrist"))
    top = int(np.argmax(found.probabilities))
    assert given["interval"] == (found.lower[top], found.upper[top])


def test_the_verdict_names_the_posterior_and_its_file(pieces, tmp_path):
    _, laplace, nuts = pieces
    (tmp_path / "posterior").mkdir()
    for method, file in POSTERIORS.items():
        (nuts if method == "nuts" else laplace).save(tmp_path / file)
    for verdict, method in SPEAKERS.items():
        (tmp_path / "comparison.json").write_text(json.dumps({"verdict": verdict}))
        assert chosen_posterior(tmp_path) == (method, POSTERIORS[method])
        loaded = load_posterior(tmp_path, method)
        if method == "nuts":
            assert torch.equal(loaded.weight, nuts.draws.weight)
        else:
            assert torch.equal(loaded.weight_mean, laplace.weight_mean)
    (tmp_path / "comparison.json").write_text(json.dumps({"verdict": "perhaps"}))
    with pytest.raises(FileFormatError, match=r"verdict is 'perhaps', not one of laplace, refine, nuts, undecided"):
        chosen_posterior(tmp_path)
