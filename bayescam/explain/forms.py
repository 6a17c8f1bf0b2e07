"""Linear forms of the last layer under its posterior: a . (theta x), directions a over classes, rows x over features.

Everything a class activation map needs is such a form. Rows are a cell's features, (..., D), or (..., D+1) with a last
entry 1 where the bias belongs to it; E is D or D+1. Directions are (R, K) in float64: a row of I - 11^T/K for a centred
class, of I for a raw one, e_c - e_d for a contrast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayescam.errors import NotPositiveDefiniteError
from bayescam.posterior.covariance import DiagCovariance, FullCovariance, KronCovariance
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace

_NUMBERS = 1 << 23  # held at once by one step of a chunked computation


class LinearForms(Protocol):
    """What is known of f = directions . (theta x): rows x (n, M, E), directions (R, K), results (n, M, R).

    Rows of D entries leave the bias out.
    """

    @property
    def num_classes(self) -> int: ...
    @property
    def num_features(self) -> int: ...
    @property
    def is_sampled(self) -> bool: ...

    def mean(self, rows: Tensor, directions: Tensor) -> Tensor: ...
    def variance(self, rows: Tensor, directions: Tensor) -> Tensor: ...
    def covariance(self, left: Tensor, right: Tensor, direction: Tensor) -> Tensor:
        """Covariance of one form at rows (n, M, E) with itself at rows (n, M2, E): (n, M, M2)."""

    def quantile(self, rows: Tensor, directions: Tensor, q: float) -> Tensor: ...
    def exceedance(self, rows: Tensor, directions: Tensor, threshold: float) -> Tensor: ...
    def draw(self, rows: Tensor, direction: Tensor, num_samples: int, seed: int) -> Tensor:
        """Joint draws of one form at M rows, (n, M, E) -> (n, S, M), in float64."""


class GaussianForms:
    """Closed forms under a Gaussian posterior; only ``draw`` samples, and that among the M rows, not among the weights.

    mean = a . (theta_mean x), variance = x Sigma(a, a) x^T with Sigma(a, a) = sum_kl a_k a_l Sigma_kl.
    """

    is_sampled = False

    def __init__(self, posterior: Laplace, like: Tensor) -> None:
        self.theta = posterior.theta_mean.to(like)
        self._exact = posterior.covariance
        self._factors: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}
        self._along_axes: dict[tuple[float, ...], Tensor] = {}
        if isinstance(self._exact, KronCovariance):
            self._rotation = self._exact.feature_vectors.to(like)

    @property
    def num_classes(self) -> int:
        return self.theta.shape[0]

    @property
    def num_features(self) -> int:
        return self.theta.shape[1] - 1

    def mean(self, rows: Tensor, directions: Tensor) -> Tensor:
        return _mean(self.theta, rows, directions)

    def variance(self, rows: Tensor, directions: Tensor) -> Tensor:
        if isinstance(self._exact, KronCovariance):
            rotated = rows @ self._rotation[: rows.shape[-1]]
            return (self._axis_variances(directions) @ rotated.square_().mT).mT
        if isinstance(self._exact, DiagCovariance):
            return (self._axis_variances(directions)[:, : rows.shape[-1]] @ rows.square().mT).mT
        flat = rows.flatten(0, -2)
        variances = [(flat @ self._factor(along)[1][: rows.shape[-1]]).square_().sum(-1) for along in directions]
        return torch.stack(variances, -1).unflatten(0, rows.shape[:-1])

    def covariance(self, left: Tensor, right: Tensor, direction: Tensor) -> Tensor:
        if not isinstance(self._exact, FullCovariance):
            exact, along = self._exact.to(left.device), direction.to(left.device)
            rows = (pad(side.double(), (0, len(self.theta[0]) - side.shape[-1])) for side in (left, right))
            return exact.bilinear(along, along, *rows)
        factor = self._factor(direction)[0]
        return (left.double() @ factor[: left.shape[-1]]) @ (right.double() @ factor[: right.shape[-1]]).mT

    def _axis_variances(self, directions: Tensor) -> Tensor:
        """``_axis_variances`` in the type of the maps; those used last are kept."""
        assert not isinstance(self._exact, FullCovariance)
        key = tuple(directions.flatten().tolist())
        if key not in self._along_axes:
            _drop_oldest(self._along_axes, 2 * self.num_classes)
            self._along_axes[key] = _axis_variances(self._exact, directions).to(self.theta)
        return self._along_axes[key]

    def _factor(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """F (E, E) with F F^T = Sigma(a, a), in float64 and in the type of the maps; those used last are kept."""
        assert isinstance(self._exact, FullCovariance)
        key = tuple(direction.tolist())
        if key not in self._factors:
            _drop_oldest(self._factors, 2 * self.num_classes)
            exact = _factor(self._exact, direction).to(self.theta.device)
            self._factors[key] = exact, exact.to(self.theta)
        return self._factors[key]

    def quantile(self, rows: Tensor, directions: Tensor, q: float) -> Tensor:
        return self.mean(rows, directions) + normal_quantile(q) * self.variance(rows, directions).sqrt()

    def exceedance(self, rows: Tensor, directions: Tensor, threshold: float) -> Tensor:
        return normal_exceedance(self.mean(rows, directions), self.variance(rows, directions).sqrt(), threshold)

    def draw(self, rows: Tensor, direction: Tensor, num_samples: int, seed: int) -> Tensor:
        """The same standard normals serve every image, so that an image's answer does not depend on its batch."""
        root = symmetric_root(self.covariance(rows, rows, direction))
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_samples, rows.shape[-2], generator=generator, dtype=torch.float64).to(root)
        return _mean(self.theta.double(), rows.double(), direction[None]).mT + z @ root


class SampledForms:
    """The same from posterior draws: moments are the draws' own (variance with S - 1), probabilities their shares."""

    is_sampled = True

    def __init__(self, draws: Draws, like: Tensor) -> None:
        weight, bias = draws.flat()
        if len(weight) < 2:
            raise ValueError("posterior has 1 draw; a spread needs at least 2")
        self.draws = torch.cat([weight, bias.unsqueeze(-1)], -1).to(like)
        self.theta = self.draws.double().mean(0).to(like)
        self._factors: dict[tuple[float, ...], Tensor] = {}

    @property
    def num_classes(self) -> int:
        return self.draws.shape[1]

    @property
    def num_features(self) -> int:
        return self.draws.shape[2] - 1

    def mean(self, rows: Tensor, directions: Tensor) -> Tensor:
        return _mean(self.theta, rows, directions)

    def variance(self, rows: Tensor, directions: Tensor) -> Tensor:
        return torch.stack([self._variance(rows, self._factor(direction)) for direction in directions], -1)

    def covariance(self, left: Tensor, right: Tensor, direction: Tensor) -> Tensor:
        factor = self._factor(direction).double()
        return (left.double() @ factor[: left.shape[-1]]) @ (right.double() @ factor[: right.shape[-1]]).mT

    def quantile(self, rows: Tensor, directions: Tensor, q: float) -> Tensor:
        return self._over_draws(rows, directions, lambda values: values.quantile(q, dim=0))

    def exceedance(self, rows: Tensor, directions: Tensor, threshold: float) -> Tensor:
        return self._over_draws(rows, directions, lambda values: (values > threshold).to(values).mean(0))

    def draw(self, rows: Tensor, direction: Tensor, num_samples: int, seed: int) -> Tensor:
        """All the draws there are; ``num_samples`` and ``seed`` do not apply."""
        return (rows @ self._along(direction)[:, : rows.shape[-1]].T).mT.double()

    def _along(self, direction: Tensor) -> Tensor:
        return torch.einsum("k,ske->se", direction.to(self.draws), self.draws)

    def _factor(self, direction: Tensor) -> Tensor:
        """F (E, min(E, S)) with F F^T the draws' covariance: their deviations, turned by QR where they are many."""
        key = tuple(direction.tolist())
        if key not in self._factors:
            _drop_oldest(self._factors, 2 * self.num_classes)
            values = self._along(direction).double()
            deviations = (values - values.mean(0)) / math.sqrt(len(values) - 1)
            if len(deviations) > deviations.shape[1]:
                deviations = torch.linalg.qr(deviations, mode="r").R
            self._factors[key] = deviations.T.to(self.draws)
        return self._factors[key]

    def _variance(self, rows: Tensor, factor: Tensor) -> Tensor:
        seen = factor[: rows.shape[-1]]
        return torch.cat([(part @ seen).square_().sum(-1) for part in _parts(rows, factor.shape[1])])

    def _over_draws(self, rows: Tensor, directions: Tensor, reduce) -> Tensor:  # noqa: ANN001
        """``reduce`` (S, m) -> (m,) for every direction, a bounded number of rows at a time."""
        results = []
        for direction in directions:
            along, flat = self._along(direction)[:, : rows.shape[-1]], rows.flatten(0, -2)
            pieces = [reduce(along @ part.T) for part in _parts(flat, len(along))]
            results.append(torch.cat(pieces).unflatten(0, rows.shape[:-1]))
        return torch.stack(results, -1)


def _axis_variances(covariance: KronCovariance | DiagCovariance, directions: Tensor) -> Tensor:
    """Variance of each direction along each axis of the features (kron: eigenvectors of A), (R, E); axes do not mix."""
    if isinstance(covariance, DiagCovariance):
        precision = covariance.precision
        return directions.to(precision).square() @ precision.reciprocal()
    directions = directions.to(covariance.class_vectors)
    seen = (directions @ covariance.class_vectors).square() @ covariance.eigenvalues.reciprocal()
    return seen + directions.sum(1, keepdim=True).square() / (covariance.num_classes * covariance.prior_precision)


_FORMS: WeakKeyDictionary[Laplace | Draws, dict[tuple[torch.dtype, torch.device], LinearForms]] = WeakKeyDictionary()


def forms_of(posterior: Laplace | Draws, like: Tensor) -> LinearForms:
    """The posterior's linear forms, in the type and on the device of ``like``; kept as long as the posterior lives."""
    if not isinstance(posterior, (Laplace, Draws)):
        raise TypeError(f"posterior must be a Laplace or Draws, got {type(posterior).__name__}; of a Nuts pass .draws")
    kept, key = _FORMS.setdefault(posterior, {}), (like.dtype, like.device)
    if key not in kept:
        kept[key] = GaussianForms(posterior, like) if isinstance(posterior, Laplace) else SampledForms(posterior, like)
    return kept[key]


def normal_exceedance(mean: Tensor, sd: Tensor, threshold: float) -> Tensor:
    """P(X > t) = Phi((mean - t) / sd) for X ~ Normal(mean, sd^2); where sd = 0 it is 1 if mean > t, else 0."""
    standard = torch.nan_to_num((mean - threshold) / sd, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return torch.special.ndtr(standard)


def _mean(theta: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
    return (directions.to(theta) @ theta[:, : rows.shape[-1]] @ rows.mT).mT


def _drop_oldest(kept: dict, most: int) -> None:
    """Make room for one more where ``most`` are kept."""
    if len(kept) >= most:
        kept.pop(next(iter(kept)))


def normal_quantile(q: float) -> float:
    """The standard normal's quantile."""
    return float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))


def symmetric_root(covariance: Tensor) -> Tensor:
    """The symmetric R with R R = covariance (..., M, M), which may be singular (dead cells, M > D).

    Raises:
        NotPositiveDefiniteError: an eigenvalue is negative beyond rounding.
    """
    values, vectors = torch.linalg.eigh(covariance)
    if not values.numel():
        return covariance
    largest = values[..., -1].clamp(min=0)
    if bool((values[..., 0] < -1e-9 * largest - 1e-300).any()):
        worst = float((values[..., 0] / largest).min())
        raise NotPositiveDefiniteError(
            f"the covariance of the map has an eigenvalue {worst:.1e} of its largest; fit the posterior in float64"
        )
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _factor(covariance: FullCovariance, direction: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(covariance.between(direction, direction))
    if int(info):
        raise NotPositiveDefiniteError(
            f"the covariance along class direction {[round(a, 3) for a in direction.tolist()]} is not positive "
            f"definite at row {int(info)}; fit the posterior in float64"
        )
    return factor


def _parts(rows: Tensor, width: int) -> Iterator[Tensor]:
    """Rows in pieces whose products with ``width`` columns stay within the memory bound."""
    each = max(1, rows[0].numel() // rows.shape[-1] if len(rows) else 1) * width
    yield from rows.split(max(1, _NUMBERS // each))
