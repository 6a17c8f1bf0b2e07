"""The gallery of a run: its radiographs in their groups, each group on colour scales of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayescam.report.cam_panels import CasePanels, cell_panels, robust_end
from bayescam.report.run_files import RunFiles
from bayescam.report.wording import chance

TITLES = {
    "surest_right": ("Surest, and right", "least entropy, each class in turn"),
    "surest_wrong": ("Surest, and wrong", "least entropy"),
    "most_uncertain": ("Least sure", "most entropy"),
}
_MOST = 24  # of a group: a page of pictures, not a catalogue
_SURE = 0.9


@dataclass(frozen=True)
class Group:
    """Some radiographs on common colour scales.

    Args:
        name: of ``TITLES``.
        first: the number of its first case among all of the page, from 1.
        cases: the radiographs.
        left_out: how many more ``cams.nc`` holds.
        limit: the colours of the mean go from -limit to limit, logits.
        spread: those of the sd from 0 to it.
    """

    name: str
    first: int
    cases: tuple[CasePanels, ...]
    left_out: int
    limit: float
    spread: float

    @property
    def beyond(self) -> tuple[bool, bool]:
        """Whether a mean, whether an sd lies beyond the end of its scale."""
        sizes = [max(np.abs(case.mean).max() for case in self.cases), max(case.sd.max() for case in self.cases)]
        return bool(sizes[0] > self.limit), bool(sizes[1] > self.spread)

    @property
    def remark(self) -> str:
        """What must be said of the group, or nothing."""
        tops = [max(case.probabilities) for case in self.cases if case.probabilities is not None]
        sure = sum(top >= _SURE for top in tops)
        if self.name != "most_uncertain" or 2 * sure <= len(tops):
            return ""
        if sure == len(tops):
            return f"Even these are sure: none gives its most probable class less than {chance(min(tops))}."
        return f"Most of these are sure: {sure} of {len(tops)} give their most probable class at least {_SURE:.2f}."


def gallery(files: RunFiles) -> list[Group]:
    """The groups that have a radiograph, in the order of ``TITLES``."""
    cases, groups, first = cam_cases(files), [], 1
    for name in TITLES:
        size = int(files.cams.attrs[name])
        shown = tuple(cases[: min(size, _MOST)])
        if shown:
            ends = [robust_end([getattr(case, what) for case in shown]) for what in ("mean", "sd")]
            groups.append(Group(name, first, shown, size - len(shown), *ends))
        first += len(shown)
        cases = cases[size:]
    return groups


def cam_cases(files: RunFiles) -> list[CasePanels]:
    """The radiographs of ``cams.nc`` with the map of each one's most probable class; the title is the image's name."""
    cams = files.cams
    marker, probs = cams["marker_outranks"].values, cams["probs"].values
    intervals = files.credible(files.mapped, files.rows_of(cams["obs_id"].values))
    cases = []
    for i, name in enumerate(cams["obs_id"].values):
        k = int(probs[i].argmax())
        together = {what: cams[what].values[i] for what in ("stands_out", "stands_out_jointly") if what in cams}
        cases.append(
            cell_panels(
                cams["image"].values[i] / 255,
                cams["mean"].values[i, k],
                cams["sd"].values[i, k],
                label=k,
                classes=files.classes,
                probabilities=probs[i].tolist(),
                title=str(name),
                joint=cams["joint"].values[i],
                attribution=cams["attribution"].values[i],
                marker=None if np.isnan(marker[i]) else float(marker[i]),
                truth=int(cams["y"].values[i]),
                interval=(float(intervals[0, i, k]), float(intervals[1, i, k])),
                **together,
            )
        )
    return cases


def tile_name(number: int, tile: str) -> str:
    """The name, without its suffix, of one tile's picture in the run folder."""
    return f"case-{number}-{tile}"
