"""What one CAM picture shows, as plain arrays and words; ``cam_figures`` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.explain.excursions import joint_exceedance
from bayescam.explain.upsample import Upsampling, pixel_maps
from bayescam.storage import printable

_FINE, _JOINT = 320, 64  # points along the longer side: of the maps, of the joint region


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
        label: the class that the map is of.
        classes: K names.
        probabilities: (K,) of the posterior predictive, or None.
        title: of the picture, shown as it is.
        interpolated: whether mean and sd are upsampled; cells as they are if not.
        doubt: (3, 3), of each ninth of the picture the share of the variance of the map's mean (and bias) that comes
            from it (``CamPosterior.attribution``), where it is known; some may be below 0.
        marker: P(the lead marker outranks the bones), where it is known.
    """

    image: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    above: np.ndarray
    joint: np.ndarray | None
    cells: tuple[int, int]
    cell_pixels: tuple[float, float]
    label: int
    classes: tuple[str, ...]
    probabilities: tuple[float, ...] | None
    title: str
    interpolated: bool
    doubt: np.ndarray | None = None
    marker: float | None = None

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
    joint = joint_exceedance(posterior, label, upsampling=coarse, num_samples=2000)
    cell = [
        geometry.size / cells * full / scaled
        for cells, full, scaled in zip(
            posterior.shape, (height, width), (geometry.scaled_height, geometry.scaled_width), strict=True
        )
    ]
    mean, sd, above, outline = (v[0].cpu().double().numpy() for v in (maps.mean, maps.sd, maps.exceedance, joint))
    return CasePanels(
        image,
        mean,
        sd,
        above,
        outline,
        cells=posterior.shape,
        cell_pixels=(cell[0], cell[1]),
        label=label,
        classes=tuple(printable(str(name), 40) for name in classes),
        probabilities=None if probabilities is None else tuple(float(p) for p in probabilities),
        title=printable(title, 80),
        interpolated=True,
        doubt=_ninths(attribution.cpu().double().numpy()),
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
) -> CasePanels:
    """The panels where only the cells' Gaussian means and sds (h, w) over the network's square are at hand.

    The cells are shown as they are, since sds may not be interpolated; ``joint`` and ``attribution``, (h, w), are too.
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
        label=label,
        classes=tuple(printable(str(name), 40) for name in classes),
        probabilities=None if probabilities is None else tuple(float(p) for p in probabilities),
        title=printable(title, 80),
        interpolated=False,
        doubt=None if attribution is None else _ninths(attribution),
        marker=marker,
    )


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def caption(case: CasePanels, *, level: float = 0.9) -> str:
    """The facts of the picture in words, for a reader who cannot see it or its colours."""
    name, (h, w) = case.classes[case.label], case.cells
    parts = []
    if case.probabilities is not None:
        order = sorted(range(len(case.classes)), key=lambda k: -case.probabilities[k])  # type: ignore[index]
        first = ", ".join(f"{case.classes[k]} {case.probabilities[k]:.3f}" for k in order[:2])
        parts.append(f"Predicted: {first}.")
    if case.is_flat:
        parts.append(f"The map of {name} is flat: no part of the picture speaks for it more than another.")
    else:
        peak = np.unravel_index(int(case.mean.argmax()), case.mean.shape)
        parts.append(
            f"Evidence for {name} is largest {_place(peak, case.mean.shape)}: {case.mean[peak]:+.2f} ± "
            f"{case.sd[peak]:.2f} logits (mean ± sd), above 0 with probability {case.above[peak]:.2f}; "
            f"it ranges from {case.mean.min():+.2f} to {case.mean.max():+.2f}."
        )
        alone = (
            f"Above 0 with probability {percent(level)} or more: {percent((case.above >= level).mean())} of the picture"
        )
        if case.joint is not None:
            alone += f" point by point (dashed), {percent((case.joint >= level).mean())} jointly (solid)"
        parts.append(alone + ".")
    if case.doubt is not None:
        most = np.unravel_index(int(case.doubt.argmax()), (3, 3))
        parts.append(
            f"What makes the model unsure of {name} lies most {_place(most, (3, 3))}: {percent(case.doubt.max())} of "
            "the variance of the map's mean, a ninth if it were spread evenly."
        )
    if case.marker is not None:
        parts.append(f"The lead marker speaks for {name} more than the bones do with probability {case.marker:.2f}.")
    size = " x ".join(f"{pixels:.0f}" for pixels in case.cell_pixels)
    parts.append(
        f"0 is the average class. The map has {h} x {w} cells: one cell is 1/{h * w} of the square that the network "
        f"saw, {size} pixels{'; between cells it is interpolated' if case.interpolated else ''}."
    )
    return " ".join(parts)


def brief_caption(case: CasePanels, *, level: float = 0.9) -> str:
    """``caption`` for a reader who sees the picture among others: without what is true of all of them."""
    name, parts = case.classes[case.label], []
    if case.probabilities is not None:
        order = sorted(range(len(case.classes)), key=lambda k: -case.probabilities[k])  # type: ignore[index]
        parts.append(
            "Predicted " + ", ".join(f"{case.classes[k]} {case.probabilities[k]:.2f}" for k in order[:2]) + "."
        )
    if case.is_flat:
        parts.append("The map is flat: no part of the picture speaks for the class more than another.")
    else:
        peak = np.unravel_index(int(case.mean.argmax()), case.mean.shape)
        jointly = "" if case.joint is None else f" cell by cell, {percent((case.joint >= level).mean())} jointly"
        parts.append(
            f"Most evidence for {name} {_place(peak, case.mean.shape)}, {case.mean[peak]:+.1f} ± {case.sd[peak]:.1f}"
            f" logits; with {percent(level)} probability {percent((case.above >= level).mean())} of the picture "
            f"speaks for it{jointly}."
        )
    if case.doubt is not None:
        most = np.unravel_index(int(case.doubt.argmax()), (3, 3))
        parts.append(f"Least sure {_place(most, (3, 3))}.")
    if case.marker is not None:
        parts.append(f"Marker before bones: {case.marker:.2f}.")
    return " ".join(parts).replace(" of the picture,", ",").replace(" of the picture.", ".")


def shared_limit(cases: Sequence[CasePanels]) -> float:
    """The largest |mean| of all cases: the end of the one colour scale they share; 1 where all are zero."""
    return max((float(np.abs(case.mean).max()) for case in cases), default=0.0) or 1.0


def shared_spread(cases: Sequence[CasePanels]) -> float:
    """The largest sd of all cases: the end of the sd's colour scale; 1 where all are zero."""
    return max((float(case.sd.max()) for case in cases), default=0.0) or 1.0


def _place(peak: Sequence[np.integer], shape: tuple[int, ...]) -> str:
    """Where a point lies, in words: a third of the picture each way, as seen on the picture."""
    row = ("top", "middle", "bottom")[min(2, 3 * int(peak[0]) // shape[0])]
    column = ("left", "centre", "right")[min(2, 3 * int(peak[1]) // shape[1])]
    return "in the centre" if (row, column) == ("middle", "centre") else f"at the {row} {column} of the picture"


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
