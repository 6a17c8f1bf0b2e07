"""One suite over every posterior head, in the manner of scikit-learn's estimator checks: what holds for all, said once.

A head is made by ``fit(features, labels)`` and asked by ``predict(head, features)``; no check knows which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace, fit_laplace, load_laplace
from bayescam.posterior.nuts import Nuts, sample_nuts
from bayescam.posterior.predictive import predict_proba

TAU = 1.0
CENTRES = np.random.default_rng(99).normal(size=(6, 8))
SLOW_HEADS = tuple(pytest.param(name, marks=pytest.mark.slow) for name in ("refined_diag", "refined_kron"))
GAUSSIAN_HEADS = ("map", "diag", "kron", "full", "refined", *SLOW_HEADS)
HEADS = (*GAUSSIAN_HEADS, pytest.param("nuts", marks=pytest.mark.slow))
each_head = pytest.mark.parametrize("name", HEADS)
each_gaussian = pytest.mark.parametrize("name", GAUSSIAN_HEADS)


def _data(n=60, d=3, k=3, seed=0):
    """Features (n, d) around a centre for each of k classes, and labels with every class present where n allows."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    return rng.normal(size=(n, d)) + 1.5 * CENTRES[:k, :d][labels], labels


def _fit(name, features, labels, **options):
    options = {"prior_precision": TAU, **options}
    structure = {"map": "full", "refined": "full", "nuts": "full"}.get(name, name.removeprefix("refined_"))
    laplace = fit_laplace(features, labels, structure=structure, **options)
    if name.startswith("refined"):
        return laplace.refine(features, labels)
    if name == "nuts":
        lengths = {"num_chains": 2, "num_samples": 25, "num_warmup": 25}
        return sample_nuts(laplace, features, labels, **lengths, seed=3, progress=False).draws
    return laplace


@functools.cache
def _plain(name):
    """The head of the plain data, fitted once: no head can be changed."""
    return _fit(name, *_data())


def _predict(name, head, features) -> Tensor:
    if name == "map":
        return torch.softmax(head.map_logits(features), dim=1)
    return head.predict_proba(features) if isinstance(head, Laplace) else predict_proba(head, features)


def _answers(name, features, labels, questions, **options) -> np.ndarray:
    return _predict(name, _fit(name, features, labels, **options), questions).numpy()


@each_head
@pytest.mark.parametrize(("n", "d", "k"), [(60, 3, 3), (60, 3, 2), (60, 1, 3), (4, 8, 3), (1, 3, 2), (1, 1, 2)])
def test_probabilities_for_one_sample_one_feature_two_classes_and_few_images(name, n, d, k):
    features, labels = _data(n, d, k)
    probs = _answers(name, features, labels, _data(11, d, k, seed=1)[0], num_classes=k)
    assert probs.shape == (11, k)
    assert (probs > 0).all()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-12)


@each_head
def test_no_question_no_answer(name):
    features, labels = _data()
    assert _answers(name, features, labels, np.empty((0, 3))).shape == (0, 3)


@each_head
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_its_place(name, value):
    features, labels = _data()
    head = _plain(name)
    broken = features.copy()
    broken[7, 1] = value
    with pytest.raises(ValueError, match=r"features\[7, 1\] is"):
        _fit(name, broken, labels)
    with pytest.raises(ValueError, match=r"features\[7, 1\] is"):
        _predict(name, head, broken)


@each_head
@pytest.mark.parametrize(
    ("features", "error"),
    [
        (np.zeros((60, 3), dtype=object), TypeError),
        (np.zeros((60, 3), dtype=complex), TypeError),
        (np.zeros((60, 3), dtype=int), TypeError),
        (np.zeros((60, 3), dtype="U4"), TypeError),
        (np.zeros((60, 3), dtype=np.longdouble), TypeError),
        (np.ma.masked_array(np.zeros((60, 3)), mask=True), TypeError),
        (torch.zeros(60, 3).to_sparse(), TypeError),
        ([[0.0] * 3] * 60, TypeError),
        (None, TypeError),
        (np.zeros((60, 3, 1)), ValueError),
        (np.zeros(60), ValueError),
        (np.zeros((0, 3)), ValueError),
        (np.zeros((60, 0)), ValueError),
        (np.zeros((59, 3)), ValueError),
    ],
)
def test_what_are_no_features_is_refused_by_name(name, features, error):
    with pytest.raises(error, match="features"):
        _fit(name, features, np.arange(60) % 3)


@each_head
@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (np.arange(60) % 3 + 0.5, ValueError),
        (np.arange(60) % 3 - 1, ValueError),
        (np.arange(60) % 4, ValueError),
        (np.full(60, np.nan), ValueError),
        ((np.arange(60) % 3)[:, None], ValueError),
        (np.arange(60) % 3 > 0, TypeError),
        (np.array(list("abc") * 20), TypeError),
        (np.array([0, 1, 2] * 20, dtype=object), TypeError),
        (None, TypeError),
    ],
)
def test_what_are_no_labels_is_refused_by_name(name, labels, error):
    with pytest.raises(error, match="labels"):
        _fit(name, _data()[0], labels, num_classes=3)


@each_head
@pytest.mark.parametrize(
    "hide", [np.ma.masked_array, lambda rows: torch.from_numpy(rows).to_sparse(), np.ndarray.tolist]
)
def test_a_question_that_hides_numbers_is_refused_by_name(name, hide):
    with pytest.raises(TypeError, match="features"):
        _predict(name, _plain(name), hide(np.zeros((5, 3))))


@each_head
def test_a_question_of_another_width_names_both_widths(name):
    head = _plain(name)
    for questions in (np.zeros((5, 4)), np.zeros((5, 2)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"features must be \(N, 3\)"):
            _predict(name, head, questions)


@each_head
def test_order_and_company_of_the_questions_do_not_matter(name):
    head, questions = _plain(name), _data(40, seed=1)[0]
    whole = _predict(name, head, questions).numpy()
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(_predict(name, head, questions[order]).numpy(), whole[order], rtol=1e-12)
    alone = np.concatenate([_predict(name, head, questions[i : i + 1]).numpy() for i in range(0, 40, 7)])
    np.testing.assert_allclose(alone, whole[::7], rtol=1e-12)


@each_gaussian
def test_the_order_of_the_training_images_does_not_matter(name):
    """To the tolerance of the optimiser. (A NUTS trajectory is chaotic in the last bit.)"""
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    order = np.random.default_rng(0).permutation(len(labels))
    whole = _predict(name, _plain(name), questions).numpy()
    np.testing.assert_allclose(_answers(name, features[order], labels[order], questions), whole, atol=1e-3)


@each_gaussian
def test_an_image_of_weight_two_is_two_images(name):
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    twice = np.concatenate([features, features[labels == 1]]), np.concatenate([labels, labels[labels == 1]])
    weighted = _answers(name, features, labels, questions, class_weights=np.array([1.0, 2.0, 1.0]))
    np.testing.assert_allclose(weighted, _answers(name, *twice, questions), atol=1e-3)


@each_gaussian
def test_renamed_classes_are_renamed_in_the_answer(name):
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    order = np.array([2, 0, 1])
    renamed = _answers(name, features, order[labels], questions)
    np.testing.assert_allclose(renamed[:, order], _predict(name, _plain(name), questions).numpy(), atol=0.01)


@each_head
def test_read_only_and_strided_arrays_and_maps_from_disk_are_as_good_as_any(name, tmp_path):
    (features, labels), questions = _data(), _data(20, seed=1)[0]
    plain = _predict(name, _plain(name), questions).numpy()
    np.save(tmp_path / "f.npy", features)
    np.save(tmp_path / "y.npy", labels)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r"), np.load(tmp_path / "y.npy", mmap_mode="r")
    strided = np.repeat(features, 2, axis=1)[:, ::2][::-1].copy(order="K")[::-1], np.repeat(labels, 3)[::3]
    fortran = np.asfortranarray(features), labels[::-1].copy()[::-1].astype(np.int32)
    tensors = torch.from_numpy(features).T.contiguous().T, torch.from_numpy(labels)
    assert not any(kind[0].flags.c_contiguous for kind in (strided, fortran))
    noise = {"atol": 0.15} if name == "nuts" else {"rtol": 1e-9}  # another memory order, another last bit
    for kind in (mapped, strided, fortran, tensors):
        np.testing.assert_allclose(_answers(name, *kind, questions), plain, **noise)
    frozen = questions.copy()
    frozen.flags.writeable = False
    head = _plain(name)
    swapped, turned = questions.astype(">f8"), questions[::-1].copy()[::-1]
    for same in (frozen, np.asfortranarray(questions), turned, swapped, torch.from_numpy(questions)):
        np.testing.assert_allclose(_predict(name, head, same).numpy(), plain, rtol=1e-9)


@each_gaussian
def test_float32_and_float64_features_agree(name):
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    single = _answers(name, features.astype(np.float32), labels, questions.astype(np.float32))
    np.testing.assert_allclose(single, _predict(name, _plain(name), questions).numpy(), atol=1e-3)


def test_float32_and_float64_features_agree_for_nuts_within_its_noise():
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    single = _answers("nuts", features.astype(np.float32), labels, questions.astype(np.float32))
    np.testing.assert_allclose(single, _predict("nuts", _plain("nuts"), questions).numpy(), atol=0.15)


@each_head
def test_nothing_that_was_given_is_changed(name):
    features, labels = _data()
    before, weights = (features.copy(), labels.copy()), np.ones(3)
    tensors = torch.from_numpy(features.copy()).requires_grad_(), torch.from_numpy(labels.copy())
    _answers(name, features, labels, features, class_weights=weights)
    with torch.no_grad():
        _predict(name, _fit(name, *tensors), tensors[0])
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(labels, before[1])
    np.testing.assert_array_equal(weights, 1)
    assert torch.equal(tensors[0].detach(), torch.from_numpy(before[0]))
    assert tensors[0].requires_grad
    assert tensors[0].grad is None


@each_head
def test_a_second_fit_and_a_second_question_give_the_same_bits_and_use_no_global_random_numbers(name):
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    head = _fit(name, features, labels)
    first = _predict(name, head, questions)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(_predict(name, head, questions), first)
    assert torch.equal(_predict(name, _fit(name, features, labels), questions), first)


@each_gaussian
def test_the_stored_head_answers_the_same(name, tmp_path):
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    head = _fit(name, features, labels, class_weights=np.array([1.0, 2.0, 0.5]))
    head.save(tmp_path / "head.safetensors")
    again = load_laplace(tmp_path / "head.safetensors")
    assert torch.equal(_predict(name, again, questions), _predict(name, head, questions))
    assert (again.notes, again.elbo, again.refined) == (head.notes, head.elbo, head.refined)
    assert torch.equal(again.sample(3, seed=1).weight, head.sample(3, seed=1).weight)


def test_stored_draws_answer_the_same(tmp_path):
    (features, labels), questions = _data(), _data(40, seed=1)[0]
    lengths = {"num_chains": 2, "num_samples": 25, "num_warmup": 25}
    laplace = fit_laplace(features, labels, prior_precision=TAU)
    nuts = sample_nuts(laplace, features, labels, **lengths, seed=3, progress=False)
    nuts.save(tmp_path / "nuts.safetensors")
    again = Nuts.load(tmp_path / "nuts.safetensors")
    assert torch.equal(predict_proba(again.draws, questions), predict_proba(nuts.draws, questions))
    assert all(torch.equal(torch.as_tensor(again.stats[key]), torch.as_tensor(nuts.stats[key])) for key in nuts.stats)


@each_gaussian
def test_a_shift_common_to_all_classes_changes_no_answer(name):
    from dataclasses import replace

    head, questions = _plain(name), _data(40, seed=1)[0]
    shift = torch.tensor([3.0, -5.0, 2.0], dtype=torch.float64)
    moved = replace(head, weight_mean=head.weight_mean + shift, bias_mean=head.bias_mean + 7)
    np.testing.assert_allclose(_predict(name, moved, questions), _predict(name, head, questions), atol=1e-10)


@each_head
def test_an_absent_class_keeps_its_column(name):
    features, labels = _data(k=2)
    probs = _answers(name, features, labels, features, num_classes=3)
    assert probs.shape == (60, 3)
    assert (probs[:, 2] < 0.5).all()


@each_head
@pytest.mark.parametrize(
    "make",
    [
        lambda x: np.concatenate([x, x], axis=1),
        lambda x: np.concatenate([x, np.zeros_like(x)], axis=1),
        lambda x: np.concatenate([x, np.ones_like(x)], axis=1),
        lambda x: x * 1e-8,
        lambda x: x * 1e3,
        lambda x: x + 50 * np.eye(3)[np.arange(len(x)) % 3],
    ],
    ids=["duplicated", "zero", "constant", "tiny", "large", "separable"],
)
def test_degenerate_features_give_probabilities(name, make: Callable[[np.ndarray], np.ndarray]):
    features, labels = _data()
    probs = _answers(name, make(features), labels, make(features))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-9)


@pytest.mark.parametrize("tau", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_prior_that_is_none_is_refused(structure, tau):
    with pytest.raises(ValueError, match="prior_precision"):
        fit_laplace(*_data(), structure=structure, prior_precision=tau)


@each_gaussian
@pytest.mark.parametrize("tau", [1e-6, 1e12])
def test_a_very_wide_and_a_very_narrow_prior_give_probabilities(name, tau):
    features, labels = _data()
    probs = _answers(name, features, labels, features, prior_precision=tau)
    assert np.isfinite(probs).all()
    if tau > 1:
        np.testing.assert_allclose(probs, 1 / 3, atol=1e-3)


def test_one_class_is_no_classifier():
    with pytest.raises(ValueError, match="num_classes"):
        fit_laplace(_data()[0], np.zeros(60, dtype=int))


def test_there_is_no_unfitted_head():
    with pytest.raises(TypeError):
        Laplace()
    with pytest.raises(TypeError):
        Draws()
    with pytest.raises(TypeError, match="draws"):
        predict_proba(None, _data()[0])
