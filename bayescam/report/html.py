"""``report.html``: one file, offline, without a script, made from the run folder alone."""

from __future__ import annotations

import base64
import math
import tomllib
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from bayescam.diagnose.diagnosis import diagnose_run
from bayescam.diagnose.intervals import count_groups, interval_words
from bayescam.errors import FileFormatError
from bayescam.report.cam_panels import brief_caption, caption
from bayescam.report.figures import cam_cases
from bayescam.report.run_files import RunFiles
from bayescam.report.style import NAMES
from bayescam.storage import write_text

HEADLINES = {
    "laplace": "The Laplace posterior predicts like NUTS here.",
    "refine": "The Laplace posterior does not predict like NUTS here; the refined one does.",
    "nuts": "Neither Gaussian posterior predicts like NUTS here; use NUTS.",
    "undecided": "Nothing can be said about Laplace: NUTS itself has not converged.",
}
SPEAKERS = {"laplace": "laplace_full", "refine": "laplace_refined", "nuts": "nuts", "undecided": "map"}
SPOKEN = {
    "laplace_full": "the Laplace posterior",
    "laplace_refined": "the refined posterior",
    "nuts": "NUTS",
    "map": "the last layer at its most probable weights",
}
AGAINST_NUTS = {"map": "MAP", "laplace": "Laplace, full", "refined": "refined", "nuts_half": "NUTS, half against half"}
DIFFERENCES = ("total_variation", "agreement", "nll_difference", "ece_difference")
GALLERY = {
    "surest_right": "The surest of those that are right, each class in turn",
    "surest_wrong": "The surest of those that are wrong",
    "most_uncertain": "The most uncertain",
}
FIGURES = ("reliability", "risk_coverage", "confusion", "agreement", "weights", "scales", "trace", "training")
UNCERTAIN = {
    "entropy": "entropy, nat",
    "mutual_information": "mutual information, nat",
    "entropy_finds_errors": "errors found by entropy, AUROC",
    "mutual_information_finds_errors": "by mutual information, AUROC",
}
HEADLINE_METRICS = ("accuracy", "nll", "ece", "brier")
MORE_METRICS = {
    "accuracy_macro": "accuracy, mean over classes",
    "ece_equal_mass": "ECE, bins of equal mass",
    "error_surest_80": "error among the surest 80 %",
    "brier_reliability": "Brier: reliability",
    "brier_resolution": "Brier: resolution",
    "brier_uncertainty": "Brier: uncertainty",
    "brier_remainder": "Brier: remainder",
}
NEITHER_BETTER = ("brier_uncertainty", "brier_remainder")


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder from its files; needs ``figures/`` to be drawn.

    Returns:
        the report's path.

    Raises:
        BayescamError: a file of the run is missing or broken.
    """
    files = RunFiles(run_folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["fixed"] = fixed
    source = package_files("bayescam.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    path = Path(run_folder) / "report.html"
    write_text(path, environment.from_string(source).render(contents(files)))
    return path


def contents(files: RunFiles) -> dict[str, Any]:
    """Everything the template shows, as plain values."""
    verdict = files.comparison["verdict"]
    diagnosis = diagnose_run(files.folder)
    shown = gallery(files)
    settings = tomllib.loads((files.folder / "config.toml").read_text(encoding="utf-8"))
    return {
        "title": f"bayescam: {files.data['name']}",
        "verdict": verdict,
        "headline": HEADLINES[verdict],
        "words": files.comparison["words"],
        "speaker": SPOKEN[SPEAKERS[verdict]],
        "plain": files.metrics["intervals"][SPEAKERS[verdict]],
        "num_weights": files.nuts_weights[0, 0].size,
        "data": files.data,
        "equal": files.data.get("equal_across_splits", []),
        "classes": class_rows(files),
        "resampled": files.resampled,
        "interval_words": interval_words(count_groups(files.patients), files.resampled, where="Below each number"),
        "metrics": files.metrics,
        "rows": metric_rows(files),
        "more_rows": metric_rows(files, list(MORE_METRICS)),
        "more": MORE_METRICS,
        "uncertainty": [{"method": NAMES.get(name, name), **row} for name, row in files.metrics["uncertainty"].items()],
        "uncertain": UNCERTAIN,
        "tolerance": files.tolerance,
        "against": against_rows(files),
        "spoken": SPOKEN,
        "figures": figures(files, shown),
        "gallery": shown,
        "cams": {key: _plain(value) for key, value in files.cams.attrs.items()},
        "checks": diagnosis.checks,
        "passed": diagnosis.passed,
        "failed": [f"{check.subject}: {check.name}" for check in diagnosis.failed],
        "nuts_doubts": [check.name for check in diagnosis.failed if check.subject == "nuts"],
        "seeds": files.json("seeds.json") if (files.folder / "seeds.json").is_file() else None,
        "environment": files.json("environment.json"),
        "timings": files.json("timings.json")["stages"],
        "settings": settings,
    }


def metric_rows(files: RunFiles, names: Sequence[str] = HEADLINE_METRICS) -> list[dict[str, Any]]:
    """Metrics of every method with their bootstrap intervals over patients; the best is marked where one is."""
    intervals = files.metrics["intervals"]
    rows = [
        {"method": NAMES.get(method, method), "cells": [{**intervals[method][name], "best": False} for name in names]}
        for method in files.metrics["methods"]
    ]
    for column, name in enumerate(names):
        larger = name.startswith("accuracy") or name == "brier_resolution"
        best = (max if larger else min)(row["cells"][column]["value"] for row in rows)
        for row in rows:
            row["cells"][column]["best"] = name not in NEITHER_BETTER and row["cells"][column]["value"] == best
    return rows


def against_rows(files: RunFiles) -> list[dict[str, Any]]:
    """How far each posterior's predictions are from NUTS's, each number with its interval over patients."""
    found = files.comparison["predictive"]
    return [
        {
            "method": words,
            "cells": [
                {"value": found[name][key], "low": found[name][f"{key}_low"], "high": found[name][f"{key}_high"]}
                for key in DIFFERENCES
            ],
        }
        for name, words in AGAINST_NUTS.items()
        if name in found
    ]


def gallery(files: RunFiles) -> list[dict[str, Any]]:
    """The gallery's radiographs in their groups: the picture's name, what it shows in brief, and in full."""
    cases = [
        {"figure": f"case-{n}", "words": brief_caption(case), "full": caption(case)}
        for n, case in enumerate(cam_cases(files), 1)
    ]
    groups = []
    for name, title in GALLERY.items():
        size = int(files.cams.attrs[name])
        groups.append({"title": title, "cases": cases[:size]})
        cases = cases[size:]
    return [group for group in groups if group["cases"]]


def class_rows(files: RunFiles) -> list[dict[str, Any]]:
    """Each class with its images by split and its accuracy under NUTS; the accuracy is None without test images."""
    found, counts = files.metrics["intervals"]["nuts"], files.data["counts"]
    return [
        {
            "name": name,
            "counts": [counts[part][name] for part in ("train", "valid", "test")],
            "accuracy": found.get(f"accuracy[{k}]"),
        }
        for k, name in enumerate(files.classes)
    ]


def figures(files: RunFiles, shown: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Every picture of the page as a data URI."""
    names = [*FIGURES, *(case["figure"] for group in shown for case in group["cases"])]
    found = {name: files.folder / "figures" / f"{name}.png" for name in names}
    for path in found.values():
        if not path.is_file():
            raise FileFormatError(f"{path}: missing; restore it or run again")
    return {name: _data_uri(path) for name, path in found.items()}


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits after the point, and no negative zero; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:z.{digits}f}"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
