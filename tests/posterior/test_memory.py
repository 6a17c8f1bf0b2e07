"""No tensor is made that grows with what must not grow: the largest of every operation is noted."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import bayescam as bc

K, D = 60, 40


class Largest(TorchDispatchMode):
    """The most numbers that one tensor's memory holds among those that operations made; views hold what they see."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, min(held, tensor.numel()))
        return out


def problem(images, width, classes):
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(images, width, generator=generator)
    labels = (phi @ torch.randn(width, classes, generator=generator)).argmax(1)
    labels[:classes] = torch.arange(classes)
    return phi, labels


def test_kron_never_makes_a_matrix_over_all_parameters():
    phi, labels = problem(150, D, K)
    maps = torch.randn(2, D, 4, 4)
    with Largest() as largest:
        fit = bc.fit_laplace(phi, labels, prior_precision=1.0, structure="kron")
        draws = fit.sample(3, seed=0)
        fit.predict_proba(phi[:10], num_points=64)
        fit.predict_proba(phi[:10], method="pairwise")
        cam = bc.CamPosterior(maps, fit)
        shapes = cam.sd.shape, cam.contrast(0, 1)[1].shape, cam.outranks(*regions(), 3).shape
    assert shapes == ((2, K, 4, 4), (2, 4, 4), (2,))
    assert draws.weight.shape == (1, 3, K, D)
    assert 0 < largest.numbers < (K * (D + 1)) ** 2 // 50


def regions():
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[:2] = True
    return top, ~top


def test_a_memory_map_is_never_held_whole(tmp_path):
    """A fit holds chunks of 2^21 numbers, the labels and a few matrices; the features stay on the disk."""
    images, width = 120_000, 48
    path = tmp_path / "phi.npy"
    phi = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(images, width))
    features, labels = problem(images, width, 3)
    phi[:] = features.numpy()
    phi.flush()
    expected = bc.fit_laplace(features, labels, prior_precision=1.0)
    with Largest() as largest:
        fit = bc.fit_laplace(np.load(path, mmap_mode="r"), labels, prior_precision=1.0)
    assert largest.numbers <= 1 << 21 < images * width / 2
    torch.testing.assert_close(fit.weight_mean, expected.weight_mean)
    torch.testing.assert_close(fit.weight_sd, expected.weight_sd)


def test_the_largest_is_seen():
    with Largest() as largest:
        torch.zeros(3, 5).expand(100, 3, 5)
    assert largest.numbers == 15
