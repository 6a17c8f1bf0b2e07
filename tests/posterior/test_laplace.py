"""fit_laplace: the MAP, Pyro's and laplace-torch's posterior, evidence, scales, notes, files, bad input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from torch.nn.functional import cross_entropy

import bayescam as bc
from bayescam.errors import FileFormatError
from bayescam.posterior.evidence import maximise
from bayescam.posterior.images import augment, check_images
from bayescam.posterior.laplace import CRITERIA, STRUCTURES
from bayescam.posterior.model import negative_log_joint

N, D, K = 200, 5, 4


def problem(dtype=torch.float64, scale=1.0):
    phi = torch.randn(N, D, dtype=dtype) * scale
    labels = torch.distributions.Categorical(logits=(phi / scale) @ torch.randn(D, K, dtype=dtype)).sample()
    return phi, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e-2, 1.0, 100.0])
def test_map_is_within_a_thousandth_of_a_posterior_sd(dtype, tau):
    phi, labels = problem(dtype)
    fit = bc.fit_laplace(phi, labels, prior_precision=tau)
    assert fit.newton_decrement < 1e-3
    theta, wide = fit.theta_mean.clone(), check_images(phi.double(), labels, num_classes=K)
    covariance = bc.fit_laplace(phi.double(), labels, prior_precision=tau).covariance
    gradient = negative_log_joint(theta, wide, tau)[1]
    assert float(covariance.whiten_gradient(gradient).norm()) < 1e-3
    assert float(fit.theta_mean.sum(0).abs().max()) < 1e-10


def test_map_minimises_the_penalised_cross_entropy():
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, prior_precision=2.0)
    theta = fit.theta_mean.requires_grad_()
    (cross_entropy(augment(phi) @ theta.T, labels, reduction="sum") + theta.square().sum()).backward()
    assert float(theta.grad.norm()) == pytest.approx(fit.gradient_norm, abs=1e-9)
    assert fit.gradient_norm < 1e-2


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sample_has_the_marginal_sds_and_the_seed_decides(structure):
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, prior_precision=1.0, structure=structure)
    draws = fit.sample(20_000, seed=3)
    assert draws.weight.shape == (1, 20_000, K, D)
    ratio = draws.weight[0].std(0) / fit.weight_sd
    assert float((ratio - 1).abs().max()) < 5 / math.sqrt(2 * 20_000)
    assert float((draws.bias[0].std(0) / fit.bias_sd - 1).abs().max()) < 5 / math.sqrt(2 * 20_000)
    torch.testing.assert_close(fit.sample(20_000, seed=3).weight, draws.weight, rtol=0, atol=0)


def test_full_posterior_is_laplace_torch_s():
    with warnings.catch_warnings(action="ignore"):
        laplace = pytest.importorskip("laplace", reason="laplace-torch is an extra: pip install bayescam[bench]")
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, prior_precision=0.8)
    head = torch.nn.Linear(D, K, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(fit.weight_mean)
        head.bias.copy_(fit.bias_mean)
    model = torch.nn.Sequential(torch.nn.Identity(), head)
    theirs = laplace.Laplace(
        model, "classification", subset_of_weights="last_layer", hessian_structure="full", prior_precision=0.8
    )
    with warnings.catch_warnings(action="ignore"):
        theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(phi, labels), batch_size=50))
    expected, guide = theirs.posterior_covariance, fit.guide
    factor = guide.scale[:, None] * guide.scale_tril
    sd = torch.cat([fit.weight_sd.flatten(), fit.bias_sd])
    assert float(((factor @ factor.T - expected) / (sd[:, None] * sd)).abs().max()) < 1e-6
    torch.testing.assert_close(sd.square(), expected.diagonal(), rtol=1e-6, atol=0)


def test_evidence_is_the_integral_where_the_posterior_is_nearly_gaussian():
    """K = 2, D = 1: the contrast's two parameters are integrated numerically; the shift's integral is 1."""
    phi = torch.randn(300, 1, dtype=torch.float64)
    labels = torch.distributions.Bernoulli(logits=0.5 * phi[:, 0] + 0.2).sample().long()
    tau = 1.0
    fit = bc.fit_laplace(phi, labels, prior_precision=tau)
    sign = (2 * labels - 1).double()

    def density(w, b):
        margin = sign * math.sqrt(2) * (w * phi[:, 0] + b)
        log = float(torch.nn.functional.logsigmoid(margin).sum()) - tau / 2 * (w * w + b * b)
        return math.exp(log + math.log(tau / (2 * math.pi)) - fit.log_evidence)

    w, b = (fit.theta_mean[1] - fit.theta_mean[0]).div(math.sqrt(2)).tolist()
    ratio, _ = dblquad(density, b - 1, b + 1, w - 1, w + 1, epsrel=1e-3, epsabs=1e-3)
    assert ratio == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_is_minus_energy_plus_half_log_volume(structure):
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, prior_precision=1.5, structure=structure)
    energy = float(negative_log_joint(fit.theta_mean, check_images(phi, labels), 1.5)[0])
    volume = fit.theta_mean.numel() / 2 * math.log(2 * math.pi) - fit.covariance.log_det_precision() / 2
    assert fit.log_evidence == pytest.approx(volume - energy, rel=1e-9)


def test_prior_precision_by_evidence_is_a_stationary_point():
    phi, labels = problem()
    chosen = bc.fit_laplace(phi, labels)
    around = [
        bc.fit_laplace(phi, labels, prior_precision=chosen.prior_precision * factor).log_evidence
        for factor in (0.8, 1.25)
    ]
    assert chosen.log_evidence > max(around)
    slope = (around[1] - around[0]) / (2 * math.log(1.25))
    assert abs(slope) < 0.2
    assert not any("bracket" in note for note in chosen.notes)


def test_evidence_derivative_is_the_finite_difference_of_its_refitted_value():
    """d log p(y)/d log tau along the re-fitted MAP, by autograd through an exact small problem."""
    phi, labels = problem()
    tau, step = 0.7, 1e-4
    up, down = (bc.fit_laplace(phi, labels, prior_precision=tau * math.exp(s)) for s in (step, -step))
    fit = bc.fit_laplace(phi, labels, prior_precision=tau)
    theta, covariance = fit.theta_mean, fit.covariance
    explicit = theta.numel() / 2 - tau / 2 * float(theta.square().sum()) - tau / 2 * float(covariance.diagonal().sum())
    rows = augment(phi)

    def log_det(flat):
        p = (rows @ flat.reshape(K, -1).T).softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("nkl,ne,nf->kelf", curvature, rows, rows).reshape(flat.numel(), -1)
        return torch.logdet(hessian + tau * torch.eye(flat.numel(), dtype=torch.float64))

    flat = theta.flatten().clone().requires_grad_()
    log_det(flat).backward()
    hessian = torch.autograd.functional.hessian(
        lambda f: cross_entropy(rows @ f.reshape(K, -1).T, labels, reduction="sum") + tau / 2 * f.square().sum(),
        theta.flatten(),
    )
    moved = -tau * torch.linalg.solve(hessian, theta.flatten())
    implicit = -0.5 * float(flat.grad @ moved)
    assert (up.log_evidence - down.log_evidence) / (2 * step) == pytest.approx(explicit + implicit, abs=2e-3)


def test_random_labels_have_no_interior_maximum_and_the_bound_is_reported():
    phi, labels = torch.randn(300, 3, dtype=torch.float64), torch.arange(300) % 3
    fit = bc.fit_laplace(phi, labels, bracket=(1e-2, 10.0))
    assert fit.prior_precision == pytest.approx(10.0)
    assert any("upper end of the bracket" in note for note in fit.notes)


def test_maximise_reports_either_end():
    assert maximise(lambda tau: -math.log(tau), (0.1, 10.0)).hit == "lower"
    assert maximise(lambda tau: math.log(tau), (0.1, 10.0)).hit == "upper"
    inside = maximise(lambda tau: -(math.log(tau) ** 2), (0.1, 10.0))
    assert inside.hit is None
    assert math.log(inside.prior_precision) == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_class_weights_are_repeated_images(structure):
    """An image of weight 2 is that image twice: in the MAP, the curvature and the evidence alike."""
    phi, labels = problem()
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0])
    twice = labels == 0
    weighted = bc.fit_laplace(phi, labels, prior_precision=1.0, structure=structure, class_weights=weights)
    repeated = bc.fit_laplace(
        torch.cat([phi, phi[twice]]), torch.cat([labels, labels[twice]]), prior_precision=1.0, structure=structure
    )
    torch.testing.assert_close(weighted.weight_mean, repeated.weight_mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weighted.weight_sd, repeated.weight_sd, rtol=1e-3, atol=1e-4)
    assert weighted.log_evidence == pytest.approx(repeated.log_evidence, rel=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("refined", [False, True])
def test_saved_and_loaded_is_the_same(structure, refined, tmp_path):
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, prior_precision=1.0, structure=structure, class_weights=np.ones(K))
    fit = fit.refine(phi, labels) if refined else fit
    fit.save(tmp_path / "laplace.safetensors")
    again = bc.load_laplace(tmp_path / "laplace.safetensors")
    torch.testing.assert_close(again.predict_proba(phi), fit.predict_proba(phi), rtol=0, atol=0)
    assert (again.log_evidence, again.notes, again.num_train) == (fit.log_evidence, fit.notes, N)
    assert (again.refined, again.elbo, again.newton_decrement) == (refined, fit.elbo, fit.newton_decrement)
    torch.testing.assert_close(again.sample(3, seed=0).weight, fit.sample(3, seed=0).weight, rtol=0, atol=0)
    assert (tmp_path / "laplace.safetensors").stat().st_size < 8 * (K * (D + 1)) ** 2 * 2 + 4096


def test_loading_nonsense_raises(tmp_path):
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="x"):
        bc.load_laplace(tmp_path / "x")
    with pytest.raises(FileFormatError, match="no such file"):
        bc.load_laplace(tmp_path / "absent")


def test_arrays_memory_maps_and_strides_are_the_same_fit(tmp_path):
    phi, labels = problem(torch.float32)
    expected = bc.fit_laplace(phi, labels, prior_precision=1.0).weight_mean
    mapped = np.lib.format.open_memmap(tmp_path / "phi.npy", mode="w+", dtype=np.float32, shape=tuple(phi.shape))
    mapped[:] = phi.numpy()
    mapped.flush()
    frozen = phi.numpy().copy()
    frozen.flags.writeable = False
    records = np.zeros(N, dtype=[("phi", "f4", D), ("side", "i1")])
    records["phi"] = phi.numpy()
    forms = {
        "memory map": np.load(tmp_path / "phi.npy", mmap_mode="r"),
        "read-only": frozen,
        "columns first": np.asfortranarray(phi.numpy()),
        "reversed": np.ascontiguousarray(phi.numpy()[::-1])[::-1],
        "big-endian": phi.numpy().astype(">f4"),
        "a field of records": records["phi"],
        "every other": np.repeat(phi.numpy(), 2, axis=1)[:, ::2],
        "transposed tensor": phi.T.contiguous().T,
    }
    for name, form in forms.items():
        found = bc.fit_laplace(form, labels.numpy().astype(">i4"), prior_precision=1.0).weight_mean
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
    assert check_images(phi.double().numpy().astype(">f8"), labels).dtype == torch.float64


def test_half_precision_is_computed_in_float32():
    phi, labels = problem(torch.float32)
    half = bc.fit_laplace(phi.half(), labels, prior_precision=1.0)
    whole = bc.fit_laplace(phi.half().float(), labels, prior_precision=1.0)
    torch.testing.assert_close(half.weight_mean, whole.weight_mean, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.full((4, 2), math.nan)}, ValueError, r"features\[0, 0\] is nan"),
        ({"features": torch.tensor([[0.0, 1], [1, math.inf], [2, 3], [4, 5]])}, ValueError, r"features\[1, 1\] is inf"),
        ({"features": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"features": [[1.0, 2.0]] * 4}, TypeError, "torch tensor or a numpy array"),
        ({"features": torch.zeros(4)}, ValueError, r"\(N, D\)"),
        ({"features": torch.zeros(4, 0)}, ValueError, "D >= 1"),
        ({"features": torch.zeros(0, 2), "labels": torch.zeros(0)}, ValueError, "N = 0"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, ValueError, r"labels\[3\] is -1"),
        ({"labels": torch.tensor([0, 1, 2, 3]), "num_classes": 3}, ValueError, r"labels\[3\] is 3, outside 0..2"),
        ({"labels": torch.tensor([0.0, 1, 0.5, 1])}, ValueError, r"labels\[2\] is 0.5, not a whole number"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"labels must be \(4,\)"),
        ({"labels": torch.zeros(4)}, ValueError, "at least 2 classes"),
        ({"labels": torch.tensor([True, False, True, False])}, TypeError, "whole numbers"),
        ({"prior_precision": 0.0}, ValueError, "prior_precision is 0.0"),
        ({"prior_precision": -1.0}, ValueError, "positive and finite"),
        ({"prior_precision": math.inf}, ValueError, "positive and finite"),
        ({"prior_precision": math.nan}, ValueError, "positive and finite"),
        ({"prior_precision": "marglik"}, ValueError, "evidence"),
        ({"structure": "lowrank"}, ValueError, "full, kron, diag"),
        ({"class_weights": torch.ones(2)}, ValueError, r"class_weights must be \(3,\)"),
        ({"class_weights": torch.tensor([1.0, 0, 1])}, ValueError, "positive"),
        ({"prior_precision": "evidence", "bracket": (1.0, 0.1)}, ValueError, "bracket"),
        ({"num_classes": 3.0}, TypeError, "num_classes must be a whole number, got 3.0"),
        ({"num_classes": "3"}, TypeError, "num_classes must be a whole number, got '3'"),
        ({"num_classes": True}, TypeError, "num_classes must be a whole number, got True"),
        (
            {"num_classes": torch.tensor([3, 3])},
            TypeError,
            r"num_classes must be a whole number, got tensor\(\[3, 3\]\)",
        ),
        ({"num_classes": 1}, ValueError, "num_classes is 1; it must be at least 2"),
        ({"prior_precision": None}, TypeError, "prior_precision must be one positive number, got None"),
        ({"prior_precision": [1.0]}, TypeError, r"prior_precision must be one positive number, got \[1.0\]"),
        ({"prior_precision": 1j}, TypeError, "prior_precision must be one positive number, got 1j"),
        ({"prior_precision": torch.ones(2)}, TypeError, "prior_precision must be one positive number, got tensor"),
        ({"prior_precision": True}, TypeError, "prior_precision must be one positive number, got True"),
        ({"prior_precision": 10**400}, ValueError, "prior_precision is inf; it must be positive and finite"),
        ({"labels": None}, TypeError, "labels must be .* got None; number the classes"),
        (
            {"labels": ["hand", "wrist", "elbow", "wrist"]},
            TypeError,
            r"labels must be .* number the classes 0..K-1, as np",
        ),
        ({"labels": np.array([0, 1, 2, 1], dtype=object)}, TypeError, "labels must be .* got object"),
        (
            {"labels": np.array(["2020-01-01"] * 4, dtype="datetime64[D]")},
            TypeError,
            "labels must be .* got datetime64",
        ),
        ({"labels": [[0, 1], [2]]}, TypeError, "labels holds rows of different lengths"),
        ({"labels": np.ma.masked_array([0, 1, 2, 1])}, TypeError, "labels is a masked array"),
        ({"labels": torch.tensor([0, 1, 2, 2**40])}, ValueError, "labels go up to 1099511627776, outside 0..K-1"),
        (
            {"labels": torch.tensor([0.0, 1, 2, 1e30])},
            ValueError,
            r"labels\[3\] is 1e\+30, not a whole number in 0..K-1",
        ),
        (
            {"features": np.zeros((4, 2), np.longdouble)},
            TypeError,
            "features must be dense real numbers of at most 64 bits",
        ),
        (
            {"features": torch.zeros(4, 2).to_sparse()},
            TypeError,
            "features must be dense .* got torch.sparse_coo; give dense",
        ),
        ({"features": np.ma.masked_array(np.zeros((4, 2)))}, TypeError, "features is a masked array, and its mask"),
        ({"class_weights": "balanced"}, TypeError, "class_weights must be .* got 'balanced'; give one positive number"),
        ({"class_weights": {0: 1.0}}, TypeError, "class_weights must be"),
        ({"class_weights": [1e300, 1, 1]}, ValueError, r"class_weights go up to 1e\+300, above 1e\+09"),
        ({"class_weights": [1.0, math.nan, 1]}, ValueError, "class_weights must be positive and finite"),
        ({"bracket": "x"}, ValueError, "bracket is 'x'; it must be two positive, finite, increasing"),
        ({"bracket": (1.0,)}, ValueError, r"bracket is \(1.0,\)"),
        ({"bracket": (1, 2, 3)}, ValueError, r"bracket is \(1, 2, 3\)"),
        ({"bracket": None}, ValueError, "bracket is None"),
        ({"bracket": ("a", "b")}, ValueError, r"bracket is \('a', 'b'\)"),
        ({"group": 1}, TypeError, "group must be a torch.distributed process group, got 1"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"features": torch.randn(4, 2), "labels": torch.tensor([0, 1, 2, 1]), "prior_precision": 1.0} | change
    with pytest.raises(error, match=message):
        bc.fit_laplace(arguments.pop("features"), arguments.pop("labels"), **arguments)


@pytest.mark.filterwarnings("error")
def test_whole_numbers_and_numbers_of_every_type_are_as_good():
    phi, labels = problem()
    expected = bc.fit_laplace(phi, labels, prior_precision=0.5).weight_mean
    for classes in (np.int64(K), torch.tensor(K), np.array(K)):
        for tau in (np.float32(0.5), torch.tensor(0.5), np.array(0.5)):
            fit = bc.fit_laplace(phi, labels, num_classes=classes, prior_precision=tau)
            torch.testing.assert_close(fit.weight_mean, expected, rtol=0, atol=0)
            assert type(fit.prior_precision) is float


@pytest.mark.filterwarnings("error")
def test_class_weights_of_every_kind_are_as_good_and_are_copied():
    phi, labels = problem()
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    expected = bc.fit_laplace(phi, labels, prior_precision=1.0, class_weights=weights)
    forms = {
        "read-only": np.broadcast_to(weights, weights.shape),
        "reversed": weights[::-1].copy()[::-1],
        "big-endian": weights.astype(">f8"),
        "list": weights.tolist(),
        "learnt": torch.tensor(weights).requires_grad_(),
    }
    for name, form in forms.items():
        fit = bc.fit_laplace(phi, labels, prior_precision=1.0, class_weights=form)
        torch.testing.assert_close(fit.weight_mean, expected.weight_mean, rtol=0, atol=0, msg=name)
        assert not fit.class_weights.requires_grad
    weights[:] = 9.0
    assert expected.class_weights.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_refined_posterior_shows_its_elbo():
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, prior_precision=1.0, structure="diag")
    refined = fit.refine(phi, labels)
    assert f"log_evidence={fit.log_evidence:.2f}" in repr(fit)
    assert f"elbo={refined.elbo:.2f}" in repr(refined)
    assert "log_evidence" not in repr(refined)
    shown = refined._repr_html_()
    assert f'ELBO</td><td style="text-align:left">{refined.elbo:.2f}<' in shown
    assert "log evidence by Laplace" in shown
    assert "ELBO" not in fit._repr_html_()


def test_whole_float_labels_are_accepted():
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels.double(), prior_precision=1.0)
    assert fit.num_classes == K


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_absent_class_is_left_to_the_prior_and_noted(structure):
    phi, labels = problem()
    fit = bc.fit_laplace(phi, labels, num_classes=K + 1, prior_precision=1.0, structure=structure)
    assert any("class 4 has no training image" in note for note in fit.notes)
    assert bool(torch.isfinite(fit.predict_proba(phi)).all())


def test_separable_data_are_noted_as_prior_dominated():
    phi = torch.randn(60, 3)
    fit = bc.fit_laplace(phi, (phi[:, 0] > 0).long(), prior_precision=0.1)
    assert any("prior-dominated" in note for note in fit.notes)
    assert fit.newton_decrement < 1e-3


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("spoil", ["duplicate", "constant", "zero", "all zero"])
def test_degenerate_features_work(structure, spoil):
    phi, labels = problem(torch.float32)
    if spoil == "duplicate":
        phi = torch.cat([phi, phi], dim=1)
    elif spoil == "all zero":
        phi = torch.zeros_like(phi)
    else:
        phi[:, 0] = 0.0 if spoil == "zero" else 3.0
    fit = bc.fit_laplace(phi, labels, prior_precision=0.5, structure=structure)
    assert fit.newton_decrement < 1e-3
    if spoil == "zero":
        torch.testing.assert_close(fit.weight_sd[:, 0], torch.full((K,), 0.5**-0.5, dtype=torch.float64))
        assert float(fit.weight_mean[:, 0].abs().max()) < 1e-6


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_features_of_any_scale(structure, scale):
    """Tiny features say what features of nought say; huge ones what features say whose weights have no prior."""
    phi, labels = problem(torch.float64)
    labels = labels[torch.randperm(N)]
    fit = bc.fit_laplace(phi * scale, labels, prior_precision=1.0, structure=structure)
    assert fit.newton_decrement < 1e-3
    alike = phi * (0.0 if scale < 1 else 1e5)
    same = bc.fit_laplace(alike, labels, prior_precision=1.0, structure=structure)
    torch.testing.assert_close(fit.predict_proba(phi * scale), same.predict_proba(alike), rtol=0, atol=2e-4)


def test_criteria_are_evidence_and_elbo():
    assert CRITERIA == ("evidence", "elbo")


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_a_hundred_classes_make_no_matrix_of_all_parameters(structure):
    phi = torch.randn(400, 64)
    labels = torch.arange(400) % 100
    fit = bc.fit_laplace(phi, labels, prior_precision=1.0, structure=structure)
    largest = max(value.numel() for value in vars(fit.covariance).values() if isinstance(value, torch.Tensor))
    assert largest <= 100 * 100
    assert fit.predict_proba(phi[:10], num_points=128).shape == (10, 100)
    assert fit.covariance.variance(augment(phi[:3]), torch.eye(100)[:5]).shape == (3, 5)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_cuda_agrees_with_the_cpu(structure):
    phi, labels = problem()
    here = bc.fit_laplace(phi, labels, prior_precision=1.0, structure=structure)
    there = bc.fit_laplace(phi.cuda(), labels, prior_precision=1.0, structure=structure)
    assert there.weight_mean.is_cuda
    torch.testing.assert_close(there.weight_mean.cpu(), here.weight_mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there.weight_sd.cpu(), here.weight_sd, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float32_features_give_the_float64_posterior(structure):
    """Non-negative, correlated, partly dead features, as after a ReLU: sds to a thousandth, evidence to a hundredth."""
    hidden = torch.relu(torch.randn(2000, 4) @ torch.randn(4, 20) + 0.2)
    hidden[:, 3] = 0.0
    labels = torch.distributions.Categorical(logits=hidden[:, :K] * 2).sample()
    narrow = bc.fit_laplace(hidden, labels, num_classes=K, prior_precision=0.1, structure=structure)
    wide = bc.fit_laplace(hidden.double(), labels, num_classes=K, prior_precision=0.1, structure=structure)
    torch.testing.assert_close(narrow.weight_sd, wide.weight_sd, rtol=2e-3, atol=0)
    assert narrow.log_evidence == pytest.approx(wide.log_evidence, abs=0.05)
