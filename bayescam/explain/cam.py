"""``CamPosterior``: class activation maps with the posterior of the layer they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bayescam.explain.arguments import check_label, check_maps, check_region, check_threshold
from bayescam.explain.forms import LinearForms, forms_of, normal_exceedance, normal_quantile
from bayescam.notebook import html_table
from bayescam.posterior.covariance import centring
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace

_CHUNK = 1 << 18  # numbers of the maps that are worked on at once: what a processor's cache holds
_ROUNDING = 1e-6  # of a feature's largest value: cells that differ by less are alike


class CamPosterior:
    """CAM_c(u) = w_c . A(u) of N images with its posterior, in logit units.

    Under a Gaussian posterior the whole map is Gaussian, Cov(CAM_c) = A Sigma_cc A^T, and nothing here is sampled;
    from draws the same quantities are those of the draws. Centred, w_c is w_c - mean_k w_k, so that 0 is the average
    class and what softmax cannot see is left out. Where the network ends in global average pooling,
    mean_u CAM_c(u) + b_c is the logit (centred alike); for other networks pass the effective maps of
    ``bayescam.explain.gradcam``.

    Args:
        maps: A, (N, D, h, w), finite. Results have their device and type (float32 at least).
        posterior: a ``Laplace`` (any structure, refined or not) or ``Draws``, over the same D features.
        centred: False gives the raw maps, whose variance is in part only the prior's (``prior_share``).

    Raises:
        TypeError, ValueError: maps that are not a finite 4-d tensor, or of another D than the posterior's.

    Source: CAM is Zhou et al. 2016; quantiles are the union (high q) and intersection (low q) maps of Bykov et al.
    2021.
    """

    def __init__(self, maps: Tensor, posterior: Laplace | Draws, *, centred: bool = True) -> None:
        check_maps(maps)
        self.maps = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
        self.posterior = posterior
        self.centred = centred
        self.forms: LinearForms = forms_of(posterior, self.maps)
        if maps.shape[1] != self.forms.num_features:
            raise ValueError(
                f"maps have D = {maps.shape[1]} features and the posterior {self.forms.num_features}; pass maps "
                "(N, D, h, w) of the network that the posterior was fitted on (explain.gradcam.explanation_maps)"
            )

    @property
    def num_images(self) -> int:
        return self.maps.shape[0]

    @property
    def num_classes(self) -> int:
        return self.forms.num_classes

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.maps.shape[2], self.maps.shape[3]

    @cached_property
    def directions(self) -> Tensor:
        """The classes as directions over the rows of the layer, (K, K): I - 11^T/K, or I for raw maps."""
        if self.centred:
            return centring(self.num_classes)
        return torch.eye(self.num_classes, dtype=torch.float64)

    @cached_property
    def mean(self) -> Tensor:
        """Posterior mean, (N, K, h, w), in logits."""
        return self._cellwise(lambda rows: self.forms.mean(rows, self.directions))

    @cached_property
    def sd(self) -> Tensor:
        """Posterior standard deviation, (N, K, h, w), in logits."""
        return self._cellwise(lambda rows: self.forms.variance(rows, self.directions).sqrt())

    def quantile(self, q: float) -> Tensor:
        """The value that CAM_c(u) is below with probability q in (0, 1): (N, K, h, w), in logits."""
        if not 0 < q < 1:
            raise ValueError(f"q is {q}; give a probability strictly between 0 and 1")
        if self.forms.is_sampled:
            return self._cellwise(lambda rows: self.forms.quantile(rows, self.directions, q))
        return self.mean + normal_quantile(q) * self.sd

    def exceedance(self, t: float) -> Tensor:
        """P(CAM_c(u) > t) at every cell by itself, (N, K, h, w); t in logits. A cell that is t exactly has 0."""
        check_threshold(t)
        if self.forms.is_sampled:
            return self._cellwise(lambda rows: self.forms.exceedance(rows, self.directions, t))
        return normal_exceedance(self.mean, self.sd, t)

    def relevance(self, t: float) -> Tensor:
        """P(|CAM_c(u)| > t) for t >= 0: that the cell speaks for or against the class by more than t logits."""
        check_threshold(t)
        if t < 0:
            raise ValueError(f"t is {t}; give a size in logits, at least 0")
        if self.forms.is_sampled:
            against = self._cellwise(lambda rows: self.forms.exceedance(rows, -self.directions, t))
        else:
            against = normal_exceedance(-self.mean, self.sd, t)
        return self.exceedance(t) + against

    def contrast(self, c: int, d: int) -> tuple[Tensor, Tensor]:
        """CAM_c - CAM_d, what speaks for class c against class d: (mean, sd), each (N, h, w), in logits."""
        for name, label in (("c", c), ("d", d)):
            check_label(label, self.num_classes, name)
        direction = torch.zeros(1, self.num_classes, dtype=torch.float64)
        direction[0, c] += 1
        direction[0, d] -= 1
        if c == d:
            zero = self.maps.new_zeros(self.num_images, *self.shape)
            return zero, zero.clone()
        mean = self._cellwise(lambda rows: self.forms.mean(rows, direction))
        sd = self._cellwise(lambda rows: self.forms.variance(rows, direction).sqrt())
        return mean[:, 0], sd[:, 0]

    def outranks(self, region_a: Tensor, region_b: Tensor, label: int | Sequence[int] | Tensor) -> Tensor:
        """P(mean CAM over A > mean CAM over B), (N,), without sampling under a Gaussian posterior.

        Args:
            region_a: bool (h, w) or (N, h, w), not empty.
            region_b: alike; may overlap A.
            label: the class, one for all images or one an image.

        Raises:
            ValueError: a region of another shape, an empty one, A and B alike, or a label out of range.
        """
        weights = self.region_weights(region_a, "region_a") - self.region_weights(region_b, "region_b")
        alike = (weights == 0).all(1)
        if bool(alike.any()):
            first = int(alike.nonzero()[0])
            raise ValueError(f"region_a and region_b are the same in image {first}; neither can outrank")

        def probability(rows: Tensor, along: Tensor, numbers: Tensor) -> Tensor:
            return self.forms.exceedance(weights[numbers].unsqueeze(1) @ rows, along, 0.0)[:, 0, 0]

        return self.by_label(label, probability)

    def region(self, region: Tensor, label: int | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The mean CAM over a region: its posterior (mean, sd), each (N,), in logits."""
        weights = self.region_weights(region, "region")

        def moments(rows: Tensor, along: Tensor, numbers: Tensor) -> Tensor:
            average = weights[numbers].unsqueeze(1) @ rows
            return torch.cat([self.forms.mean(average, along), self.forms.variance(average, along).sqrt()], -1)[:, 0]

        mean, sd = self.by_label(label, moments).unbind(1)
        return mean, sd

    def attribution(self, label: int | Sequence[int] | Tensor) -> Tensor:
        """Which cells make the logit unsure: Cov(CAM_c(u) + b_c, logit_c), (N, h, w), in logits squared.

        Signed and additive: its mean over the cells is Var(logit_c), logit_c = mean_u CAM_c(u) + b_c (raw or centred as
        the maps are). The bias stands in every cell, so that nothing is left over.
        """

        def covariances(rows: Tensor, along: Tensor, _: Tensor) -> Tensor:
            biased = with_bias(rows)
            return self.forms.covariance(biased, biased.mean(1, keepdim=True), along[0])[..., 0]

        return self.by_label(label, covariances).to(self.maps).unflatten(1, self.shape)

    def logit(self) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of mean_u CAM_c(u) + b_c, (N, K) each: the logit after global average pooling."""
        rows = with_bias(torch.cat([rows.mean(1, keepdim=True) for rows, _ in self.rows()]))
        return self.forms.mean(rows, self.directions)[:, 0], self.forms.variance(rows, self.directions).sqrt()[:, 0]

    def relative(self) -> CamPosterior:
        """The maps less their own means, CAM_c(u) - mean_v CAM_c(v), in logits: 0 is the average cell of the image.

        What answers "where?" in an image that speaks for the class everywhere: ``relative().exceedance(0)`` is the
        probability that a cell has more evidence than the average cell. It is the map of A(u) - mean_v A(v), so that it
        has the same closed forms; cells that differ by rounding are alike, and a flat map stays flat. The bias is no
        cell's, so ``logit`` and ``attribution`` of it say nothing of the network.
        """
        away = self.maps - self.maps.mean((2, 3), keepdim=True)
        alike = away.abs() <= _ROUNDING * self.maps.abs().amax((2, 3), keepdim=True)
        return CamPosterior(away.masked_fill(alike, 0.0), self.posterior, centred=self.centred)

    def prior_share(self) -> Tensor:
        """Var(mean_k CAM_k(u)) / Var(raw CAM_c(u)): the part of raw variance that no image can reduce, (N, K, h, w).

        The numerator is the shift common to all classes, which softmax cannot see: under structures full and kron
        exactly the prior's |A(u)|^2 / (K tau). 0 where a cell has no variance at all.
        """
        average = torch.full((1, self.num_classes), 1 / self.num_classes, dtype=torch.float64)
        raw = torch.eye(self.num_classes, dtype=torch.float64)

        def share(rows: Tensor) -> Tensor:
            total = self.forms.variance(rows, raw)
            return torch.where(total > 0, self.forms.variance(rows, average) / total, torch.zeros_like(total))

        return self._cellwise(share)

    def select(self, rows: Sequence[int] | Tensor) -> CamPosterior:
        """The same for some of the images."""
        return CamPosterior(self.maps[torch.as_tensor(rows)], self.posterior, centred=self.centred)

    def __repr__(self) -> str:
        (h, w), kind = self.shape, "centred" if self.centred else "raw"
        share = ""
        if not self.centred and self.num_images:
            first = self.select(range(min(self.num_images, 8)))
            share = f", {first.prior_share().mean():.0%} of its variance is only prior"
        return f"CamPosterior(images={self.num_images}, classes={self.num_classes}, cells={h}x{w}, {kind}{share})"

    def _repr_html_(self) -> str:
        (h, w), kind = self.shape, "draws" if self.forms.is_sampled else "Gaussian"
        rows = [
            ("images", self.num_images),
            ("classes", self.num_classes),
            ("cells", f"{h} x {w}"),
            ("posterior", kind),
            ("maps", "centred over classes" if self.centred else "raw"),
        ]
        return html_table("Class activation maps", rows)

    def rows(self, indices: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Cells as rows (n, U, D) and whose they are (n,); a bounded number at a time."""
        each = max(1, _CHUNK // self.maps[0].numel()) if self.num_images else 1
        whole = torch.arange(self.num_images, device=self.maps.device) if indices is None else indices
        for number, part in enumerate(whole.split(each)):
            start = number * each
            maps = self.maps[start : start + each] if indices is None else self.maps[part]  # a view, a copy
            yield maps.flatten(2).mT, part

    def region_weights(self, region: Tensor, name: str) -> Tensor:
        """A region as weights (N, U) that take the mean over it."""
        cells = check_region(region, self.num_images, self.shape, name).to(self.maps.device).flatten(1).to(self.maps)
        return (cells / cells.sum(1, keepdim=True)).expand(self.num_images, -1)

    def labels(self, label: int | Sequence[int] | Tensor) -> Tensor:
        """One class an image, (N,)."""
        try:
            labels = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError):
            labels = torch.empty(0)
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not whole or labels.shape not in ((), (self.num_images,)):
            raise ValueError(f"label must be a whole number or one an image, ({self.num_images},); got {label!r}")
        for value in labels.unique().tolist():
            check_label(value, self.num_classes, "label")
        return labels.to(self.maps.device).expand(self.num_images)

    def by_label(
        self, label: int | Sequence[int] | Tensor, compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """compute(rows (n, U, E), directions (1, K), image numbers (n,)) -> (n, ...) for each image's own class.

        It is called for images of one class at a time; the answers come back in the order of the images, (N, ...).
        """
        labels, found, order = self.labels(label), [], []
        for value in labels.unique().tolist() or [0]:
            chosen = (labels == value).nonzero().flatten()
            order.append(chosen)
            for rows, numbers in self.rows(chosen):
                found.append(compute(rows, self.directions[value, None], numbers))
        return torch.cat(found)[torch.cat(order).argsort()]

    def _cellwise(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """compute(rows (n, U, E)) -> (n, U, R), for all images, as (N, R, h, w)."""
        return torch.cat([compute(rows).mT.unflatten(2, self.shape) for rows, _ in self.rows()])


def with_bias(rows: Tensor) -> Tensor:
    """Rows (..., D) with a last entry 1, (..., D+1)."""
    return torch.nn.functional.pad(rows, (0, 1), value=1.0)
