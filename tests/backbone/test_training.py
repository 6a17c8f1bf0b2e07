"""Training: the interrupted run is the straight run, the seed decides everything, augmentation stays in range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, augment, one_cycle, train_backbone
from bayescam.data.pixels import Geometry, Pixels
from bayescam.errors import BayescamError, FileFormatError

SIZE, N = 32, 48


@pytest.fixture(scope="module")
def problem():
    """Images whose bright third says the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % 3
    images = rng.integers(0, 20000, (N, SIZE, SIZE)).astype(np.uint16)
    for image, label in zip(images, labels, strict=True):
        image[:, 10 * label : 10 * label + 10] += 30000
    pixels = Pixels(images, tuple(Geometry.fit(SIZE, SIZE, SIZE) for _ in range(N)))
    return pixels, labels.astype(np.int64)


def _train(problem, checkpoint=None, *, seed=0, epochs=3, learning_rate=3e-3, stop_after=None):
    pixels, labels = problem
    torch.manual_seed(1)
    backbone = bc.Backbone("small", 3, image_size=SIZE)
    rows = np.arange(N)
    settings = TrainingSettings(epochs=epochs, batch_size=16, learning_rate=learning_rate)

    class Stop(Exception):
        """What a killed process would have been."""

    def train():
        return train_backbone(
            backbone,
            pixels,
            labels,
            train=rows[:36],
            valid=rows[36:],
            settings=settings,
            seed=seed,
            checkpoint=checkpoint,
            progress=False,
        )

    if stop_after is None:
        return backbone, train()
    from bayescam.backbone import training

    whole = training._store

    def store_then_stop(*arguments):
        whole(*arguments)
        if len(arguments[-1]) == stop_after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_store", store_then_stop)
        with pytest.raises(Stop):
            train()
    return backbone, None


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True))


@pytest.mark.parametrize("stop_after", [1, 2])
def test_interrupted_and_resumed_equals_straight(tmp_path, problem, stop_after):
    straight, history = _train(problem)
    checkpoint = tmp_path / "c.safetensors"
    _train(problem, checkpoint, stop_after=stop_after)
    torch.manual_seed(999)
    resumed, again = _train(problem, checkpoint)
    assert _same(straight, resumed)
    assert history == again


def test_the_seed_decides(problem):
    first, _ = _train(problem)
    torch.rand(5)
    second, _ = _train(problem)
    other, _ = _train(problem, seed=1)
    assert _same(first, second)
    assert not _same(first, other)


def test_it_learns_and_leaves_the_network_in_eval_mode(problem):
    backbone, history = _train(problem, epochs=12)
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert not backbone.net.training


def test_a_checkpoint_of_another_run_is_refused(tmp_path, problem):
    checkpoint = tmp_path / "c.safetensors"
    _train(problem, checkpoint, stop_after=1)
    with pytest.raises(FileFormatError, match="another seed"):
        _train(problem, checkpoint, seed=1)
    with pytest.raises(FileFormatError, match="another settings"):
        _train(problem, checkpoint, epochs=4)


def test_a_loss_that_is_not_finite_is_named(problem):
    with pytest.raises(BayescamError, match=r"loss is not finite in epoch 1; lower train\.learning_rate"):
        _train(problem, learning_rate=1e30)


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path, monkeypatch, problem):
    checkpoint = tmp_path / "training.safetensors"
    _train(problem, checkpoint, epochs=1)
    monkeypatch.setattr("bayescam.backbone.training.size", lambda group: 2)
    with pytest.raises(FileFormatError, match="begun on 1 ranks and goes on with 2"):
        _train(problem, checkpoint, epochs=1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_batch_too_small_for_the_ranks_is_refused(monkeypatch, problem, ranks):
    pixels, labels = problem
    monkeypatch.setattr("bayescam.backbone.training.size", lambda group: ranks)
    settings = TrainingSettings(epochs=1, batch_size=2 * ranks - 1)
    with pytest.raises(BayescamError, match=rf"train.batch_size is .*let it be at least {2 * ranks}"):
        train_backbone(
            bc.Backbone("small", 3, image_size=SIZE),
            pixels,
            labels,
            train=np.arange(36),
            valid=np.arange(36, N),
            settings=settings,
            seed=0,
            checkpoint=None,
            progress=False,
        )


def test_augmented_images_stay_in_range_and_follow_their_own_amounts_alone():
    images, amounts = torch.rand(6, 1, 24, 24), torch.rand(6, 6)
    one = augment(images, amounts)
    assert one.shape == images.shape
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1
    torch.testing.assert_close(augment(images[2:5], amounts[:, 2:5]), one[2:5])
    assert not torch.equal(one, augment(images, amounts.flip(1)))


def test_the_cycle_rises_and_falls():
    assert one_cycle(0) == pytest.approx(0.1)
    assert one_cycle(0.2) == pytest.approx(1)
    assert one_cycle(1) == pytest.approx(0.01)
