"""The same answer, whatever the machine: workers, threads, chunks, batches, GPU, each within a stated tolerance."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bayescam.backbone.network import Backbone
from bayescam.data.dataset import open_dataset
from bayescam.explain.cam import CamPosterior
from bayescam.posterior import images
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts
from bayescam.posterior.predictive import predict_proba


def _data(n=600, d=6, k=3):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % k
    return torch.from_numpy(rng.normal(size=(n, d)) + rng.normal(size=(k, d))[labels]), torch.from_numpy(labels)


def _heads(features, labels):
    """Every Gaussian head's probabilities at one tau, and the evidence."""
    found = {}
    for structure in ("diag", "kron", "full"):
        laplace = fit_laplace(features, labels, structure=structure, prior_precision=1.0)
        found[structure] = laplace.predict_proba(features[:50]).cpu()
        found[f"{structure} evidence"] = torch.tensor(laplace.log_evidence / len(labels))
    found["refined"] = laplace.refine(features, labels).predict_proba(features[:50]).cpu()
    return found


def _assert_close(found, wanted, **tolerance):
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_pixels_do_not_depend_on_the_number_of_workers(tiny, tmp_path):
    """To the last bit."""
    dataset = open_dataset(tiny)
    found = [
        np.array(dataset.pixels(32, num_workers=workers, cache=tmp_path / str(workers), progress=False).images)
        for workers in (0, 1, 3)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_simulated_radiographs_do_not_depend_on_the_number_of_workers(tmp_path):
    """To the last bit, in worker processes too."""
    dataset = open_dataset("phantom", num=14, seed=3)
    alone = dataset.pixels(32, num_workers=1, cache=tmp_path / "1", progress=False).images
    shared = dataset.pixels(32, num_workers=2, cache=tmp_path / "2", progress=False).images
    np.testing.assert_array_equal(np.array(alone), np.array(shared))


def test_features_do_not_depend_on_the_batch_size(tiny, tmp_path):
    """Within 1e-5 of their size: a convolution may be summed in another order."""
    dataset = open_dataset(tiny)
    pixels = dataset.pixels(32, cache=tmp_path, progress=False)
    torch.manual_seed(0)
    backbone = Backbone("small", 3, image_size=32)
    whole = backbone.extract(dataset, pixels=pixels, batch_size=90, progress=False).features
    for size in (1, 7, 64):
        found = backbone.extract(dataset, pixels=pixels, batch_size=size, progress=False).features
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.slow
def test_posteriors_do_not_depend_on_the_chunk_size(monkeypatch):
    """Within 1e-7: float64 sums in another order, and the optimiser's tolerance far below that."""
    features, labels = _data()
    whole = _heads(features, labels)
    chunks = images.TrainingImages.chunks
    monkeypatch.setattr(images.TrainingImages, "chunks", lambda self, rows=None: chunks(self, 37))
    _assert_close(_heads(features, labels), whole, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_posteriors_do_not_depend_on_the_number_of_threads():
    """Within 1e-7."""
    features, labels = _data()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(_heads(features, labels))
    finally:
        torch.set_num_threads(threads)
    _assert_close(found[1], found[0], rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_nuts_does_not_depend_on_threads_or_workers():
    """To the last bit: each chain has its own stream and one thread."""
    features, labels = _data(90, 3)
    laplace = fit_laplace(features, labels, prior_precision=1.0)
    threads, draws = torch.get_num_threads(), []
    try:
        for number, workers in ((1, 0), (2, 0), (1, 2)):
            torch.set_num_threads(number)
            lengths = {"num_chains": 2, "num_samples": 10, "num_warmup": 20, "num_workers": workers}
            draws.append(sample_nuts(laplace, features, labels, **lengths, progress=False).draws.theta())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_number_of_workers(driver, settings, tiny, tmp_path):
    """metrics.json to the last bit."""
    found = []
    for workers in ("0", "2"):
        out, config = tmp_path / workers, settings(tiny)
        flags = ("--num-workers", workers)
        outcome = driver.sketch("run", "--config", config, "--out", out, *flags, cache=tmp_path / f"cache{workers}")
        assert outcome.status == 0, outcome.err
        found.append((out / "metrics.json").read_text())
    assert found[0] == found[1]
    assert json.loads(found[0])["num_test"] > 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_the_gpu_agrees_with_the_cpu():
    """Float64 heads and maps within 1e-6, float32 ones within 1e-3; a network's float32 features within 1e-3."""
    features, labels = _data()
    cpu, gpu = _heads(features, labels), _heads(features.cuda(), labels.cuda())
    _assert_close(gpu, cpu, rtol=1e-6, atol=1e-6)
    _assert_close(_heads(features.float().cuda(), labels.cuda()), cpu, rtol=1e-3, atol=1e-3)
    laplace = fit_laplace(features, labels, prior_precision=1.0)
    draws = laplace.sample(200, seed=0)
    moved = type(draws)(draws.weight.cuda(), draws.bias.cuda())
    torch.testing.assert_close(
        predict_proba(moved, features.cuda()).cpu(), predict_proba(draws, features), rtol=1e-9, atol=1e-9
    )
    maps = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    for posterior, there in ((laplace, laplace.to("cuda")), (draws, moved)):
        here, far = CamPosterior(maps, posterior), CamPosterior(maps.cuda(), there)
        assert far.sd.is_cuda
        torch.testing.assert_close(far.mean.cpu(), here.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(far.sd.cpu(), here.sd, rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    backbone = Backbone("small", 3, image_size=32).eval()
    pictures = torch.rand(8, 1, 32, 32)
    with backbone.evaluating():
        wanted = backbone.pool(backbone.maps(pictures))
        found = backbone.to("cuda").pool(backbone.maps(pictures.cuda())).cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
