"""Everything with a device on it, on a GPU that is not there: it runs, stays there, and says what the CPU says.

``same`` computes twice: with tensors put on the stand-in of ``tests/stand_in_device.py``, which refuses what CUDA
refuses, and with tensors on the CPU outside of it. Answers that are tensors must lie there; arrays need not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.cli import main as bayescam
from bayescam.data.pixels import Geometry
from bayescam.diagnose.calibration import classification_metrics, entropy, mutual_information
from bayescam.diagnose.weight_agreement import weight_agreement
from bayescam.explain import baselines, localise, regions
from bayescam.explain.excursions import joint_exceedance
from bayescam.explain.gradcam import completeness_gap, explanation_maps
from bayescam.explain.upsample import Upsampling, cells_of_mask, pixel_maps
from bayescam.posterior.nuts import Nuts
from bayescam.posterior.predictive import METHODS
from bayescam.posterior.short_chains import short_chains
from bayescam.posterior.temperature import fit_temperature
from bayescam.storage import load_tensors

from ..stand_in_device import stand_in_device

N, D, K = 90, 4, 3
STRUCTURES = ("full", "kron", "diag")
LENGTHS = {"num_chains": 2, "num_samples": 4, "num_warmup": 5, "progress": False}


def same(compute, tolerance=1e-8):
    """compute(put) on the CPU and with ``put`` moving tensors to the stand-in: equal, and there."""
    wanted = compute(lambda tensor: tensor)
    with stand_in_device():
        found = compute(Tensor.cuda)
        assert all(value.is_cuda for value in found if isinstance(value, Tensor))
        found = [value.cpu() if isinstance(value, Tensor) else value for value in found]
    for own, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(own), rtol=tolerance, atol=tolerance)


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    phi = torch.randn(N, D, dtype=torch.float64, generator=generator)
    noise = torch.randn(N, K, dtype=torch.float64, generator=generator)
    return phi, (phi @ torch.randn(D, K, dtype=torch.float64, generator=generator) + noise).argmax(1)


def fitted(put, structure="full", **options):
    phi, labels = (put(part.clone()) for part in data())
    return bc.fit_laplace(phi, labels, structure=structure, **{"prior_precision": 1.0} | options), phi, labels


def told(fit: bc.Laplace) -> list:
    return [fit.weight_mean, fit.bias_mean, fit.weight_sd, fit.bias_sd, fit.log_evidence, fit.prior_precision]


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda there: there + torch.ones(3),
        lambda there: torch.where(there > 0, torch.ones(3), there),
        lambda there: there @ torch.ones(3),
        lambda there: torch.cat([there, torch.ones(3)]),
        lambda there: torch.stack([there[0], torch.tensor(1.0)]),
        lambda there: torch.ones(3).add_(there),
        lambda there: torch.tensor(1.0).add_(there[0]),
        lambda there: torch.ones(3)[there.long()],
        lambda there: there.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
        lambda there: there.gather(0, torch.tensor([0])),
        lambda there: there.long() @ there.long(),
        lambda there: torch.histogram(there, 3),
        lambda there: there.numpy(),
        lambda there: np.asarray(there),
        lambda there: torch.from_numpy(np.ones(3, np.float32)) * there,
        lambda there: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda there: torch.rand(3, generator=torch.Generator("cuda")),
        lambda there: there.to("cuda:1"),
    ],
)
def test_the_stand_in_refuses_what_cuda_refuses(forbidden):
    with stand_in_device(), pytest.raises((RuntimeError, TypeError)):
        forbidden(torch.arange(3.0, device="cuda"))


def test_the_stand_in_takes_what_cuda_takes():
    with stand_in_device():
        there = torch.arange(6.0, device="cuda").view(2, 3)
        there[0] = 1
        there[torch.tensor([1]), torch.tensor([2])] = torch.tensor(9.0)
        there[:, 1].mul_(torch.tensor(2.0))
        assert (there * torch.tensor(3.0)).is_cuda
        assert there[torch.tensor([1])].is_cuda
        assert torch.where(there > 1, 0.0, there).is_cuda
        assert there.new_zeros(2).is_cuda
        assert torch.zeros(2).copy_(there[0, :2]).device.type == "cpu"
        assert f"{there.sum():.0f} {there.max().item()}" == "24 9.0"
        assert there.tolist() == [[1, 2, 1], [3, 8, 9]]
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda:7")


def test_autograd_works_in_the_stand_in():
    def gradients(put):
        torch.manual_seed(0)
        here = torch.randn(4, 3, requires_grad=True)
        weight = put(torch.randn(3, 2)).requires_grad_()
        output = (put(here) if put is Tensor.cuda else here) @ weight
        loss = (output.relu() + output[:, :1]).square().sum() + weight.sum()
        loss.backward()
        (twice,) = torch.autograd.grad((weight**3).sum(), weight)
        return [weight.grad, here.grad.numpy(), twice]

    same(gradients, 1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_gaussian_and_its_predictions(structure, tmp_path):
    def everything(put):
        weights = put(torch.tensor([1.0, 2.0, 1.0]))
        fit, phi, labels = fitted(put, structure, class_weights=weights)
        found = told(fit)
        found += [fit.predict_proba(phi, method=method, num_points=64) for method in METHODS if method == "mc"]
        found += [fit.predict_proba(data()[0], method=method) for method in METHODS if method != "mc"]
        draws = fit.sample(7, seed=1)
        found += [draws.weight, draws.centred().bias, bc.predict_proba(draws, phi), *fit.logit_moments(phi)]
        fit.save(tmp_path / "fit.safetensors")
        again = bc.load_laplace(tmp_path / "fit.safetensors")
        assert again.weight_mean.device.type == "cpu"
        moved = again.to(phi.device)
        proba = fit.predict_proba(phi, method="map")
        found += [moved.weight_sd, moved.class_weights, moved.to("cpu").weight_mean.numpy(), entropy(proba)]
        found += [mutual_information(draws, phi), *classification_metrics(proba, labels).values()]
        return [*found, fit.newton_decrement < 1, fit_temperature(fit.map_logits(phi), labels)]

    same(everything)


def test_features_of_a_memory_map_are_worked_off_where_the_labels_lie(tmp_path):
    phi, labels = data()
    np.save(tmp_path / "phi.npy", phi.numpy())
    mapped = np.load(tmp_path / "phi.npy", mmap_mode="r")
    same(lambda put: told(bc.fit_laplace(mapped, put(labels), prior_precision=1.0)))
    same(lambda put: told(bc.fit_laplace(put(phi.float()), labels.numpy(), prior_precision=1.0)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_elbo_and_refinement(structure):
    def chosen(put):
        by_evidence, phi, labels = fitted(put, structure, prior_precision="evidence")
        refined = by_evidence.refine(phi, labels)
        return [*told(by_evidence), *told(refined), refined.elbo]

    same(chosen, 1e-6)
    if structure == "kron":
        same(lambda put: told(fitted(put, structure, prior_precision="elbo", bracket=(0.98, 1.02))[0]), 1e-5)


@pytest.mark.parametrize(
    ("kernel", "tau_prior"),
    [("hmc", None), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in [("nuts", None), ("nuts", "gamma")])],
)
def test_chains_and_chains_that_were_kept(kernel, tau_prior, tmp_path):
    def drawn(put):
        folder = tmp_path / str(put is Tensor.cuda)
        fit, phi, labels = fitted(put)
        first = bc.sample_nuts(fit, phi, labels, kernel=kernel, tau_prior=tau_prior, folder=folder, **LENGTHS)
        (folder / "chain-1.safetensors").unlink()
        again = bc.sample_nuts(fit, phi, labels, kernel=kernel, tau_prior=tau_prior, folder=folder, **LENGTHS)
        assert torch.equal(again.draws.weight, first.draws.weight)
        again.save(folder / "nuts.safetensors")
        assert Nuts.load(folder / "nuts.safetensors").draws.weight.device.type == "cpu"
        return [again.draws.weight, again.draws.bias, again.stats["lp"], again.num_gradients]

    same(drawn, 1e-6)


def test_pyro_guides_models_and_short_chains():
    def by_pyro(put):
        pyro.clear_param_store()
        torch.manual_seed(0)
        fit, phi, labels = fitted(put)
        guide = bc.AutoLastLayerLaplace(functools.partial(bc.last_layer, num_classes=K, prior_precision=1.0))
        inference = pyro.infer.SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        losses = [inference.step(phi, labels) for _ in range(3)]
        around = guide.laplace_approximation(phi, labels)
        chains = short_chains(fit, phi, labels, num_chains=8, num_transitions=1)
        own = fit.guide
        return [*losses, around.loc.detach(), around.scale_tril.detach(), own.loc, own.scale_tril, chains.mean_shift]

    same(by_pyro, 1e-6)


@pytest.mark.slow
def test_comparison_arviz_and_leaving_one_out():
    def judged(put):
        fit, phi, labels = fitted(put)
        nuts = bc.sample_nuts(fit, phi, labels, kernel="hmc", **LENGTHS | {"num_samples": 30})
        maps = put(torch.rand(2, D, 2, 2, generator=torch.Generator().manual_seed(0)))
        found = list(weight_agreement(fit, nuts.draws).summary().values())
        compared = bc.compare_posteriors(fit, nuts, phi, labels, maps=maps, training=data())
        found += [value for _, value in sorted(_numbers(compared.to_dict()))]
        for source in (fit, nuts, nuts.draws):
            idata = bc.to_inference_data(
                source, phi, labels, num_samples=6, seed=0, train=(phi, labels), log_likelihood="train"
            )
            for group in ("posterior", "log_likelihood"):
                found += [value.values for value in idata[group].data_vars.values()]
            if source is not nuts.draws:
                found.append(bc.leave_one_out(idata).elpd)
        return found

    same(judged, 1e-6)


def _numbers(tree, name=""):
    """The numbers of nested dictionaries and lists, by their place."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _numbers(value, f"{name}/{key}")
    elif isinstance(tree, int | float):
        yield name, float(tree)


@pytest.mark.parametrize(
    ("source", "posterior_there"),
    [
        ("full", True),
        ("draws", True),
        *(pytest.param(*kind, marks=pytest.mark.slow) for kind in [("kron", True), ("diag", True), ("full", False)]),
    ],
)
def test_maps_regions_and_pixels(source, posterior_there):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(4, D, 3, 3, dtype=torch.float64, generator=generator)
    top, corner = torch.zeros(2, 3, 3, dtype=torch.bool)
    top[0], corner[2, 1:] = True, True
    label = torch.tensor([0, 1, 2, 1])
    pixels = torch.zeros(4, 12, 12, dtype=torch.bool)
    pixels[:, :4] = True

    def explained(put):
        fit = fitted(put if posterior_there else lambda tensor: tensor, "full" if source == "draws" else source)[0]
        cam = bc.CamPosterior(put(maps), fit.sample(40, seed=0) if source == "draws" else fit)
        assert "3x3" in repr(cam)
        assert "3x3" in repr(bc.CamPosterior(put(maps), cam.posterior, centred=False))
        wide = Upsampling.to_size((3, 3), (6, 6))
        share = regions.energy(cam, top, put(label))
        found = [cam.mean, cam.sd, cam.quantile(0.9), cam.exceedance(0.1), cam.relevance(0.1), *cam.contrast(0, 2)]
        found += [cam.outranks(put(top), corner, put(label)), cam.outranks(top, put(corner), 1), cam.select([2]).sd]
        found += [*cam.region(top, label), cam.attribution(2), *cam.logit(), cam.prior_share(), cam.by_label(1, _first)]
        found += [*vars(share).values(), regions.peak_probability(cam, 1), regions.hit_rate(cam, corner, label)]
        found += [joint_exceedance(cam, put(label)), joint_exceedance(cam, 1, upsampling=wide)]
        found += list(vars(pixel_maps(cam, put(label), wide, t=0.1)).values())
        geometry = Geometry.fit(12, 12, 16)
        square = wide.values(cam.mean[:, 0])
        found += [cells_of_mask(put(pixels[0]), (3, 3), geometry), square, baselines.random_cam(put(maps))]
        big = put(torch.rand(4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
        scores = ("hit", "energy", "iou", "average_precision", "rank_accuracy")
        found += [getattr(localise, name)(big, put(pixels)) for name in scores] + [localise.otsu(big)]
        return [*found, localise.hit(big, pixels), localise.is_flat(big), baselines.edges(big)]

    same(explained)


def _first(rows: Tensor, along: Tensor, numbers: Tensor) -> Tensor:
    return rows[:, 0, :1] * along.to(rows)[0, 0] + numbers.unsqueeze(1)


@pytest.mark.parametrize("name", ["small", pytest.param("study", marks=pytest.mark.slow)])
def test_a_network_is_trained_resumed_and_explained(name, tmp_path):
    """Batch normalisation, dropout, AdamW and its checkpoint; forward-mode derivatives where pool is not a mean."""
    dataset = bc.open_dataset("phantom", num=21)
    pixels = dataset.pixels(48, num_workers=1, progress=False)
    train, valid = np.arange(14), np.arange(14, 21)

    def trained(put):
        checkpoint = tmp_path / f"{put is Tensor.cuda}.safetensors"
        for _ in range(2):  # the second time from the checkpoint
            torch.manual_seed(0)
            backbone = bc.Backbone(name, 7, image_size=48).to("cuda" if put is Tensor.cuda else "cpu")
            history = train_backbone(
                backbone,
                pixels,
                dataset.labels,
                train=train,
                valid=valid,
                settings=TrainingSettings(epochs=2, batch_size=7),
                seed=0,
                checkpoint=checkpoint,
                progress=False,
            )
        features = backbone.extract(dataset, pixels=pixels, with_maps=True, progress=False)
        images = put(pixels.batch(np.arange(3)))
        maps = explanation_maps(backbone, images)
        with backbone.evaluating():
            gap = completeness_gap(backbone.pool, backbone.maps(images), maps)
        backbone.save(checkpoint.with_suffix(".net"), classes=list("abcdefg"))
        loaded = bc.Backbone.load(checkpoint.with_suffix(".net"))[0].head.weight.detach().numpy()
        numbers = [history[-1].train_loss, history[-1].valid_loss, features.features.numpy(), features.maps.numpy()]
        return [*numbers, loaded, maps, gap]

    same(trained, 1e-4)


@pytest.mark.slow
def test_a_run_on_the_device_end_to_end(tmp_path, capsys):
    """Training to report, ``--resume``, ``predict`` and ``explain``; the Gaussian is the CPU's on the same features."""
    settings, run = tmp_path / "settings.toml", tmp_path / "run"
    settings.write_text(_SETTINGS)
    command = ["run", "--data", "phantom", "--preset", "quick", "--device", "cuda", "--config", str(settings)]
    picture = tmp_path / "picture.png"
    _draw(picture)
    with stand_in_device():
        assert bayescam([*command, "--out", str(run)]) == 0
        assert bayescam([*command, "--out", str(run), "--resume"]) == 0
        assert bayescam(["doctor"]) == 0
        assert "cuda: a stand-in" in capsys.readouterr().out
        assert bayescam(["predict", str(picture), "--run", str(run), "--device", "cuda", "--json"]) == 0
        there = json.loads(capsys.readouterr().out)
        assert bayescam(["explain", str(picture), "--run", str(run), "--out", str(tmp_path / "maps")]) == 0
    assert json.loads((run / "environment.json").read_text())["gpu"] == "a stand-in"
    capsys.readouterr()
    assert bayescam(["predict", str(picture), "--run", str(run), "--device", "cpu", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert [value for _, value in _numbers(there)] == pytest.approx([value for _, value in _numbers(here)], abs=1e-4)
    tensors, _ = load_tensors(run / "features.safetensors", kind="features")
    rows = np.array([line.rsplit(",", 1)[1] == "train" for line in (run / "split.csv").read_text().splitlines()[1:]])
    own = bc.fit_laplace(tensors["features"][rows], tensors["labels"][rows], num_classes=7, prior_precision=1.0)
    torch.testing.assert_close(bc.load_laplace(run / "posterior/laplace.safetensors").weight_sd, own.weight_sd)


@pytest.mark.slow
def test_features_on_the_device_end_to_end(tmp_path):
    """``posterior --device cuda`` says what the CPU says of the same features."""
    phi, labels = data()
    np.savez(tmp_path / "features.npz", features=phi.numpy(), labels=labels.numpy())
    command = ["posterior", "--features", str(tmp_path / "features.npz"), "--prior-precision", "1"]
    command += ["--num-chains", "1", "--num-samples", "20", "--num-warmup", "20"]
    with stand_in_device():
        assert bayescam([*command, "--device", "cuda", "--out", str(tmp_path / "there")]) == 0
    assert bayescam([*command, "--device", "cpu", "--out", str(tmp_path / "here")]) == 0
    there, here = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("there", "here"))
    for name in ("map", "laplace_diag", "laplace_kron", "laplace_full", "laplace_refined"):
        assert there["methods"][name] == pytest.approx(here["methods"][name], rel=1e-6), name


_SETTINGS = """
[data]
image_size = 32
phantom_images = 180
[train]
epochs = 1
[posterior]
num_samples = 20
prior_precision = 1.0
[nuts]
num_chains = 2
num_samples = 10
num_warmup = 20
[explain]
num_images = 3
"""


def _draw(path: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * bc.open_dataset("phantom", num=7).image(0)).astype(np.uint8)).save(path)
