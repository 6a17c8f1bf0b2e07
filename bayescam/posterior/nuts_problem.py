"""What a chain needs to know, as plain tensors: made from a Laplace posterior, sent to worker processes as one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayescam.posterior.hierarchical import HierarchicalPotential
from bayescam.posterior.images import TrainingImages, as_features
from bayescam.posterior.nuts_chain import ChainSettings, fingerprint
from bayescam.posterior.nuts_potential import SoftmaxLikelihood, WhitenedPotential, whitening_basis
from bayescam.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace


@dataclass(frozen=True, eq=False)
class Problem:
    """A target and the Gaussian that whitens it.

    Args:
        images: the training images.
        mean: m, the centred [weight, bias] of the whitening Gaussian, (K, D+1), float64.
        basis: A, (K(D+1), (K-1)(D+1)): theta's contrast part is m + A z.
        prior_precision: tau; of the whitening Gaussian if tau is sampled.
        tau_prior: (shape, rate) of tau's Gamma prior, or None for a fixed tau.
    """

    images: TrainingImages
    mean: Tensor
    basis: Tensor
    prior_precision: float
    tau_prior: tuple[float, float] | None

    @classmethod
    def of(cls, laplace: Laplace, images: TrainingImages, tau_prior: tuple[float, float] | None) -> Problem:
        """Check that ``laplace`` fits the images, and take from it what whitening needs.

        Raises:
            ValueError: laplace was fitted on other shapes.
        """
        d = laplace.weight_mean.shape[1]
        if d != images.num_features:
            raise ValueError(
                f"features has {images.num_features} columns, but laplace was fitted on {d}; give the features it was "
                "fitted on"
            )
        mean = torch.cat([laplace.weight_mean, laplace.bias_mean.unsqueeze(1)], 1).double()
        basis = whitening_basis(laplace.covariance)
        tau = float(laplace.prior_precision)
        return cls(images, (mean - mean.mean(0)).to(images.device), basis.to(images.device), tau, tau_prior)

    def potential(self) -> WhitenedPotential | HierarchicalPotential:
        """The potential energy over z, or over (z, log tau) if tau is sampled."""
        likelihood = SoftmaxLikelihood(self.images)
        if self.tau_prior is None:
            return WhitenedPotential(likelihood, mean=self.mean, basis=self.basis, prior_precision=self.prior_precision)
        return HierarchicalPotential(
            likelihood, mean=self.mean, basis=self.basis, prior_precision=self.prior_precision, tau_prior=self.tau_prior
        )

    def fingerprint(self, settings: ChainSettings) -> str:
        """One digest of everything that decides the draws of a chain."""
        facts = {"prior_precision": self.prior_precision, "tau_prior": self.tau_prior}
        return fingerprint(settings, facts, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "features": as_features(self.images.features),
            "labels": self.images.labels,
            "mean": self.mean,
            "basis": self.basis,
        }
        weights = self.images.image_weights
        return tensors if weights is None else tensors | {"image_weights": weights}

    def save(self, path: Path, settings: ChainSettings) -> None:
        """Write the problem and the settings for worker processes."""
        metadata = {
            "kind": "nuts-problem",
            "prior_precision": self.prior_precision,
            "tau_prior": self.tau_prior,
            "num_classes": self.images.num_classes,
            "settings": asdict(settings),
            "fingerprint": self.fingerprint(settings),
        }
        save_tensors(path, self._tensors(), metadata)


def load_problem(path: Path) -> tuple[Problem, ChainSettings, str]:
    """Read back what ``Problem.save`` wrote: the problem, the settings and their fingerprint."""
    tensors, metadata = load_tensors(path, kind="nuts-problem")
    images = TrainingImages(
        tensors["features"], tensors["labels"], metadata["num_classes"], tensors.get("image_weights")
    )
    prior = metadata["tau_prior"]
    problem = Problem(
        images,
        tensors["mean"],
        tensors["basis"],
        metadata["prior_precision"],
        None if prior is None else (prior[0], prior[1]),
    )
    return problem, ChainSettings(**metadata["settings"]), metadata["fingerprint"]
