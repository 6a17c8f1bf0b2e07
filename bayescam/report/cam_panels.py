"""What one CAM picture shows, as plain arrays and words; ``cam_figures`` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.explain.excursions import joint_exceedance
from bayescam.explain.upsample import Upsampling, pixel_maps
from bayescam.report.wording import chance, percent
from bayescam.storage import printable

_FINE, _JOINT = 320, 64  # points along the longer side: of the maps, of the joint region
_UNEVEN = 1.5  # times a ninth: from here on it is worth saying which ninth of a picture the doubt comes from
_STEPS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True, eq=False)
class Chance:
    """A probability at every point by itself, jointly where that is known, and what it is of, in short and in full."""

    alone: np.ndarray
    jointly: np.ndarray | None
    name: str
    words: str


@dataclass(frozen=True, eq=False)
class CasePanels:
    """One radiograph and the posterior of one class's map over it.

    Args:
        image: (H, W) in [0, 1], as it came, 0 black.
        mean, sd: of the map in logits, over the picture at any resolution.
        above: P(CAM > 0) by itself at every point, at the same resolution.
        joint: F, the joint exceedance (``explain.excursions``), at a resolution of its own; None where it is not known.
        cells: (h, w) of the map before upsampling.
        cell_pixels: height and width of one cell in pixels of the image.
        average: the mean of the map over its cells, logits.
        label: the class that the map is of.
        classes: K names.
        probabilities: (K,) of the posterior predictive, or None.
        title: of the picture, shown as it is.
        interpolated: whether mean and sd are upsampled; cells as they are if not.
        doubt: (3, 3), of each ninth of the picture the share of the variance of the map's mean (and bias) that comes
            from it (``CamPosterior.attribution``), where it is known; some may be below 0.
        marker: P(the lead marker outranks the bones), where it is known.
        truth: the class that the image is of, where it is known.
        interval: the 90 % credible interval of the most probable class's probability, where it is known.
        stands_out: P(CAM > the map's own mean) by itself at every point, like ``above``, where it is known.
        stands_out_jointly: the same as a joint exceedance, like ``joint``.
    """

    image: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    above: np.ndarray
    joint: np.ndarray | None
    cells: tuple[int, int]
    cell_pixels: tuple[float, float]
    average: float
    label: int
    classes: tuple[str, ...]
    probabilities: tuple[float, ...] | None
    title: str
    interpolated: bool
    doubt: np.ndarray | None = None
    marker: float | None = None
    truth: int | None = None
    interval: tuple[float, float] | None = None
    stands_out: np.ndarray | None = None
    stands_out_jointly: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("image", "mean", "sd", "above"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} of {self.title!r} holds NaN or infinite numbers; a picture would hide them")
        if not 0 <= self.label < len(self.classes):
            raise ValueError(f"label is {self.label}; there are classes 0 to {len(self.classes) - 1}")

    @property
    def sureness(self) -> np.ndarray:
        """P(the map has the sign of its mean) at every point."""
        return np.where(self.mean > 0, self.above, 1 - self.above)

    @property
    def is_flat(self) -> bool:
        """Whether the mean is the same everywhere, so that the map points nowhere."""
        return float(np.ptp(self.mean)) <= 1e-6 * max(1.0, float(np.abs(self.mean).max()))


def case_panels(
    image: np.ndarray,
    posterior: CamPosterior,
    *,
    label: int,
    classes: Sequence[str],
    probabilities: Sequence[float] | None = None,
    geometry: Geometry | None = None,
    title: str = "",
    interval: tuple[float, float] | None = None,
) -> CasePanels:
    """The panels of one image: mean and covariance of its cells carried to the image's own pixels.

    Args:
        image: (H, W) in [0, 1], the original.
        posterior: of this image alone (N = 1).
        label: the class.
        classes: K names.
        probabilities: (K,) of the posterior predictive.
        geometry: how the network saw the image; None where it saw it as it is.
        title: a line above the picture.
        interval: the 90 % credible interval of the most probable class's probability.
    """
    if posterior.num_images != 1:
        raise ValueError(f"posterior is of {posterior.num_images} images; pass posterior.select([n])")
    height, width = image.shape
    geometry = geometry or Geometry(height, width, max(height, width), height, width, 0, 0)
    if (geometry.height, geometry.width) != (height, width):
        raise ValueError(f"image is {image.shape} and its geometry {(geometry.height, geometry.width)}")
    fine = Upsampling.to_original(posterior.shape, _sampled(geometry, _FINE))
    maps, attribution = pixel_maps(posterior, label, fine), fine.values(posterior.attribution(label)[0])
    coarse = Upsampling.to_original(posterior.shape, _sampled(geometry, _JOINT))
    relative = posterior.relative()
    stands_out = pixel_maps(relative, label, fine).exceedance
    joint, together = (
        joint_exceedance(one, label, upsampling=coarse, num_samples=2000) for one in (posterior, relative)
    )
    cell = [
        geometry.size / cells * full / scaled
        for cells, full, scaled in zip(
            posterior.shape, (height, width), (geometry.scaled_height, geometry.scaled_width), strict=True
        )
    ]
    mean, sd, above, *regions = (
        v[0].cpu().double().numpy() for v in (maps.mean, maps.sd, maps.exceedance, joint, stands_out, together)
    )
    return CasePanels(
        image,
        mean,
        sd,
        above,
        regions[0],
        cells=posterior.shape,
        cell_pixels=(cell[0], cell[1]),
        average=float(posterior.mean[0, label].mean()),
        label=label,
        classes=tuple(printable(str(name), 40) for name in classes),
        probabilities=None if probabilities is None else tuple(float(p) for p in probabilities),
        title=printable(title, 80),
        interpolated=True,
        doubt=_ninths(attribution.cpu().double().numpy()),
        interval=interval,
        stands_out=regions[1],
        stands_out_jointly=regions[2],
    )


def cell_panels(
    image: np.ndarray,
    mean: np.ndarray,
    sd: np.ndarray,
    *,
    label: int,
    classes: Sequence[str],
    probabilities: Sequence[float] | None = None,
    title: str = "",
    joint: np.ndarray | None = None,
    attribution: np.ndarray | None = None,
    marker: float | None = None,
    truth: int | None = None,
    interval: tuple[float, float] | None = None,
    stands_out: np.ndarray | None = None,
    stands_out_jointly: np.ndarray | None = None,
) -> CasePanels:
    """The panels where only the cells' Gaussian means and sds (h, w) over the network's square are at hand.

    The cells are shown as they are, since sds may not be interpolated; what else is known of cells, (h, w), is too.
    Arguments as in ``CasePanels``; ``attribution`` is ``CamPosterior.attribution``'s.
    """
    from scipy.special import ndtr

    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.where(sd > 0, ndtr(mean / sd), (mean > 0).astype(float))
    return CasePanels(
        image,
        np.asarray(mean, dtype=float),
        np.asarray(sd, dtype=float),
        above,
        joint,
        cells=(mean.shape[0], mean.shape[1]),
        cell_pixels=(image.shape[0] / mean.shape[0], image.shape[1] / mean.shape[1]),
        average=float(np.mean(mean)),
        label=label,
        classes=tuple(printable(str(name), 40) for name in classes),
        probabilities=None if probabilities is None else tuple(float(p) for p in probabilities),
        title=printable(title, 80),
        interpolated=False,
        doubt=None if attribution is None else _ninths(attribution),
        marker=marker,
        truth=truth,
        interval=interval,
        stands_out=stands_out,
        stands_out_jointly=stands_out_jointly,
    )


def shown_chance(case: CasePanels) -> Chance:
    """What the probability tile shows: that a place stands out or, where that is not known, has evidence above 0."""
    if case.stands_out is not None:
        return Chance(case.stands_out, case.stands_out_jointly, "P(stands out)", "P(evidence > the map's mean)")
    return Chance(case.above, case.joint, "P(evidence > 0)", "P(evidence > 0)")


def caption(case: CasePanels, *, level: float = 0.9) -> str:
    """The facts of the picture in words, for a reader who cannot see it or its colours."""
    name, (h, w) = case.classes[case.label], case.cells
    parts = [*_predicted(case), *_nothing_to_see(case)]
    if not case.is_flat:
        peak = np.unravel_index(int(case.mean.argmax()), case.mean.shape)
        parts.append(
            f"Evidence for {name} is largest {_place(peak, case.mean.shape)}: {case.mean[peak]:+.1f} ± "
            f"{case.sd[peak]:.1f} logits (mean ± sd); it ranges from {case.mean.min():+.1f} to {case.mean.max():+.1f}, "
            f"the map's mean is {case.average:+.1f}."
        )
        parts += _regions(case, level)
    if (doubt := _doubt(case)) is not None:
        parts.append(
            f"What makes the model unsure of {name} lies most {_place(doubt[0], (3, 3))}: {percent(doubt[1])} of the "
            "variance of the map's mean, against a ninth if it were spread evenly."
        )
    if case.marker is not None:
        parts.append(f"The lead marker speaks for {name} more than the bones do with probability {case.marker:.2f}.")
    size = " x ".join(f"{pixels:.0f}" for pixels in case.cell_pixels)
    parts.append(
        f"0 is the mean of all classes; the class's logit is the map's mean, and a bias. The map has {h} x {w} cells: "
        f"one is 1/{h * w} of the square that the network saw, {size} pixels"
        f"{'; between cells it is interpolated' if case.interpolated else ''}."
    )
    return " ".join(parts)


def brief_caption(case: CasePanels, *, level: float = 0.9) -> list[str]:
    """``caption`` for a reader who sees the picture among others, in lines: without what is true of all of them."""
    lines = [*_predicted(case), *_nothing_to_see(case)]
    if not case.is_flat:
        peak = np.unravel_index(int(case.mean.argmax()), case.mean.shape)
        lines.append(
            f"Most evidence {_place(peak, case.mean.shape, '')}, {case.mean[peak]:+.1f} ± {case.sd[peak]:.1f} logits; "
            f"the map's mean is {case.average:+.1f}."
        )
        shown = shown_chance(case)
        words = "Stands out" if case.stands_out is not None else "Speaks for the class"
        words += f" in {percent((shown.alone >= level).mean())} of the picture"
        if shown.jointly is not None:
            words += f" ({percent((shown.jointly >= level).mean())} all at once)"
        if case.stands_out is not None:
            words += f", speaks for the class in {percent((case.above >= level).mean())}"
        lines.append(words + ".")
    if (doubt := _doubt(case)) is not None:
        lines.append(f"Least sure {_place(doubt[0], (3, 3), '')}.")
    if case.marker is not None:
        lines.append(f"Marker before bones: {chance(case.marker)}.")
    return lines


def shared_limit(cases: Sequence[CasePanels]) -> float:
    """The largest |mean| of all cases: the end of the one colour scale they share; 1 where all are zero."""
    return max((float(np.abs(case.mean).max()) for case in cases), default=0.0) or 1.0


def shared_spread(cases: Sequence[CasePanels]) -> float:
    """The largest sd of all cases: the end of the sd's colour scale; 1 where all are zero."""
    return max((float(case.sd.max()) for case in cases), default=0.0) or 1.0


def robust_end(values: Sequence[np.ndarray]) -> float:
    """A round number that 95 % of all values do not exceed in size: the end of a colour scale; 1 where all are 0.

    So that one picture with much evidence does not wash the others out; what is beyond has the end's colour.
    """
    sizes = np.concatenate([np.abs(value).ravel() for value in values])
    reached = float(np.quantile(sizes, 0.95)) or float(sizes.max())
    if reached == 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(reached))
    return float(power * next(step for step in _STEPS if step * power >= reached * (1 - 1e-9)))


def _predicted(case: CasePanels) -> list[str]:
    """What the image shows, what was predicted, how surely, and what else it might be."""
    truth = None if case.truth is None else case.classes[case.truth]
    if case.probabilities is None:
        return [] if truth is None else [f"Truth {truth}."]
    order = sorted(range(len(case.classes)), key=lambda k: -case.probabilities[k])  # type: ignore[index]
    first, second = order[0], order[1] if len(order) > 1 else None
    name = case.classes[first]
    words = f"Truth and prediction {name}" if case.truth == first else f"Predicted {name}"
    if truth is not None and case.truth != first:
        words = f"Truth {truth}; predicted {name}"
    words += f", {chance(case.probabilities[first])}"
    if case.interval is not None:
        low, high = case.interval
        words += f" [{chance(low) if low >= 0.995 else f'{low:.2f}'}, {high:.2f}]"
    if second is not None and case.probabilities[second] >= 0.005:
        words += f"; next {case.classes[second]}, {chance(case.probabilities[second])}"
    return [words + "."]


def _nothing_to_see(case: CasePanels) -> list[str]:
    """Warnings of an image that is one even grey, and of a map that points nowhere."""
    parts = []
    if float(np.ptp(case.image)) == 0:
        parts.append("The image is one even grey: there is nothing in it to see.")
    if case.is_flat:
        name = case.classes[case.label]
        parts.append(f"The map of {name} is flat: no part of the picture speaks for it more than another.")
    return parts


def _regions(case: CasePanels, level: float) -> list[str]:
    """How much of the picture stands out, and how much speaks for the class at all, with probability ``level``."""

    def shares(values: np.ndarray, joint: np.ndarray | None) -> str:
        found = f"{percent((values >= level).mean())} of the picture"
        if joint is not None:
            found += f", each place by itself, {percent((joint >= level).mean())} all at once"
        return found

    name, sure = case.classes[case.label], f"with probability {percent(level)} or more"
    if case.stands_out is None:
        return [f"Above 0 {sure}: {shares(case.above, case.joint)}."]
    return [
        f"Above the map's mean {sure}: {shares(case.stands_out, case.stands_out_jointly)}.",
        f"For {name} rather than the average class: {percent((case.above >= level).mean())}.",
    ]


def _doubt(case: CasePanels) -> tuple[Sequence[np.integer], float] | None:
    """The ninth that most of the variance of the map's mean comes from, and its share; None where it is about even."""
    if case.doubt is None or case.doubt.max() < _UNEVEN / 9:
        return None
    return np.unravel_index(int(case.doubt.argmax()), (3, 3)), float(case.doubt.max())


def _place(peak: Sequence[np.integer], shape: tuple[int, ...], of: str = " of the picture") -> str:
    """Where a point lies, in words: a third of the picture each way, as seen on the picture."""
    row = ("top", "middle", "bottom")[min(2, 3 * int(peak[0]) // shape[0])]
    column = ("left", "centre", "right")[min(2, 3 * int(peak[1]) // shape[1])]
    return "in the centre" if (row, column) == ("middle", "centre") else f"at the {row} {column}{of}"


def _ninths(attribution: np.ndarray) -> np.ndarray | None:
    """The share of each ninth, (3, 3), in the sum of a map; None where that is 0."""
    total = float(attribution.sum())
    if total <= 0:
        return None
    shares = []
    for size in attribution.shape:
        edges, starts = np.arange(size + 1) * 3 / size, np.arange(3)[:, None]
        shares.append((np.minimum(edges[1:], starts + 1) - np.maximum(edges[:-1], starts)).clip(0) * size / 3)
    return shares[0] @ attribution @ shares[1].T / total


def _sampled(geometry: Geometry, longest: int) -> Geometry:
    """The same picture with at most ``longest`` points along its longer side."""
    shrink = min(1.0, longest / max(geometry.height, geometry.width))
    return replace(
        geometry, height=max(1, round(geometry.height * shrink)), width=max(1, round(geometry.width * shrink))
    )
