"""``report.html``: one file, offline, without a script, made from the run folder alone."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from bayescam.diagnose.diagnosis import Diagnosis
from bayescam.diagnose.intervals import count_groups, interval_words
from bayescam.errors import FileFormatError
from bayescam.report.cam_panels import brief_caption, caption, shown_chance
from bayescam.report.cam_tiles import CHANCE, SIGNED, SPREAD, TILES, colour_stops
from bayescam.report.gallery import TITLES, Group, gallery, tile_name
from bayescam.report.glossary import GLOSSARY, term_of_check
from bayescam.report.judgement import (
    HEADLINES,
    SPOKEN,
    SUBJECTS,
    close_enough,
    consequence,
    far_from_map,
    soundness,
    trainings,
)
from bayescam.report.run_files import SPLITS, RunFiles
from bayescam.report.weights import effects, told_from_zero, top_features
from bayescam.report.wording import NAMES, compact, digits_of, fixed, percent, tight
from bayescam.storage import write_text

AGAINST_NUTS = {"map": NAMES["map"], "laplace": NAMES["laplace_full"], "refined": NAMES["laplace_refined"]}
DIFFERENCES = ("total_variation", "agreement", "nll_difference", "ece_difference")
FIGURES = (
    "reliability",
    "risk_coverage",
    "confusion",
    "distance",
    "agreement",
    "effects",
    "weights",
    "trace",
    "training",
)
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
_OPEN = 3  # radiographs of a group that are not folded away


def write_report(files: RunFiles) -> Path:
    """Write ``report.html`` into a run folder from its files; needs ``figures/`` to be drawn.

    Returns:
        the report's path.

    Raises:
        BayescamError: a file of the run is missing or broken.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"fixed": fixed, "percent": percent, "tight": tight}
    source = package_files("bayescam.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    shown = gallery(files)
    page = {**contents(files), **pictured(files, shown), "figure": figures(files, shown)}
    path = files.folder / "report.html"
    write_text(path, environment.from_string(source).render(page))
    return path


def contents(files: RunFiles) -> dict[str, Any]:
    """What the report and the model card say, as plain values."""
    diagnosis = files.diagnosis
    told, weights, narrowed = told_from_zero(files)
    timings = files.json("timings.json")
    return {
        "name": files.data["name"],
        "verdict": files.verdict,
        "headline": HEADLINES[files.verdict],
        "words": files.comparison["words"],
        "consequence": consequence(files),
        "far": far_from_map(files),
        "speaker": SPOKEN[files.speaker],
        "speaker_name": NAMES[files.speaker],
        "mapped": SPOKEN[files.mapped],
        "plain": files.metrics["intervals"][files.speaker],
        "data": files.data,
        "equal": files.data.get("equal_across_splits", []),
        "disputed": files.data.get("equal_of_several_labels", []),
        "classes": class_rows(files),
        "totals": [sum(files.data["counts"][part].values()) for part in SPLITS],
        "patients": [files.patients_by_split[part] for part in SPLITS],
        "num_unnamed": files.num_unnamed,
        "resampled": files.resampled,
        "num_resampled": count_groups(files.patients),
        "interval_words": interval_words(count_groups(files.patients), files.resampled, where="Below each number"),
        "interval_words_in_brackets": interval_words(count_groups(files.patients), files.resampled),
        "metrics": files.metrics,
        "rows": metric_rows(files),
        "more_rows": metric_rows(files, list(MORE_METRICS)),
        "more": MORE_METRICS,
        "uncertainty": [{"method": NAMES.get(name, name), **row} for name, row in files.metrics["uncertainty"].items()],
        "uncertain": UNCERTAIN,
        "limits": files.limits,
        "thresholds": files.comparison["thresholds"],
        "against": against_rows(files),
        "told": told,
        "num_weights": weights,
        "narrowed": narrowed,
        "cams": {key: value.item() if hasattr(value, "item") else value for key, value in files.cams.attrs.items()},
        "marker": marker_words(files),
        "checks": check_rows(diagnosis),
        "soundness": soundness(diagnosis),
        "seeds": files.seeds,
        "trainings": trainings(files),
        "environment": files.json("environment.json"),
        "timings": timings["stages"],
        "finished": timings.get("finished"),
        "identity": files.identity,
        "settings": files.settings,
        "glossary": GLOSSARY,
    }


def metric_rows(files: RunFiles, names: Sequence[str] = HEADLINE_METRICS) -> list[dict[str, Any]]:
    """Metrics of every method with their bootstrap intervals; what prints as well as the best is marked with it."""
    intervals = files.metrics["intervals"]
    rows = [
        {
            "method": NAMES.get(method, method),
            "cells": [{**intervals[method][name], "digits": digits_of(name), "best": False} for name in names],
        }
        for method in files.metrics["methods"]
    ]
    for column, name in enumerate(names):
        larger = name.startswith("accuracy") or name == "brier_resolution"
        cells = [row["cells"][column] for row in rows]
        best = fixed((max if larger else min)(cell["value"] for cell in cells), digits_of(name))
        for cell in cells:
            cell["best"] = name not in NEITHER_BETTER and fixed(cell["value"], digits_of(name)) == best
    return rows


def against_rows(files: RunFiles) -> list[dict[str, Any]]:
    """How far each posterior's predictions are from NUTS's, and whether that is close; last NUTS, half against half."""
    found = files.comparison["predictive"]

    def cells(name: str) -> list[dict[str, Any]]:
        return [
            {
                "value": found[name][key],
                "low": found[name][f"{key}_low"],
                "high": found[name][f"{key}_high"],
                "digits": digits_of(key),
            }
            for key in DIFFERENCES
        ]

    rows = [
        {"method": words, "cells": cells(name), "close": close_enough(files, name)}
        for name, words in AGAINST_NUTS.items()
        if name in found
    ]
    return [*rows, {"method": "NUTS, half against half", "cells": cells("nuts_half"), "close": None}]


def class_rows(files: RunFiles) -> list[dict[str, Any]]:
    """Each class with its images by split and the speaker's accuracy on it, None without test images."""
    found, counts = files.metrics["intervals"][files.speaker], files.data["counts"]
    return [
        {"name": name, "counts": [counts[part][name] for part in SPLITS], "accuracy": found.get(f"accuracy[{k}]")}
        for k, name in enumerate(files.classes)
    ]


def marker_words(files: RunFiles) -> dict[str, Any] | None:
    """How often the marker outranks the bones, on average over test images; None where no image shows both."""
    found = files.cams.attrs
    if not found["marker_images"]:
        return None
    low, high = (float(found[f"marker_{end}"]) for end in ("low", "high"))
    words = f"{fixed(low, 2)} to {fixed(high, 2)}, 90 % interval over {files.resampled}"
    interval = "no interval" if math.isnan(low) else words
    return {"images": int(found["marker_images"]), "mean": float(found["marker_mean"]), "interval": interval}


def check_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The checks by subject, each with the term that explains it."""
    return [
        {
            "subject": SUBJECTS.get(subject, subject),
            "checks": [
                {
                    "name": check.name,
                    "term": term_of_check(check.name),
                    "number": compact(check.value),
                    "rule": _short_numbers(check.words),
                    "word": check.word,
                }
                for check in diagnosis.checks
                if check.subject == subject
            ],
        }
        for subject in dict.fromkeys(check.subject for check in diagnosis.checks)
    ]


def _short_numbers(rule: str) -> str:
    """1.77e+04 in a rule as 17,700; a rule that ends with the name of an image stays as it is."""
    found = r"(?<=[ ])\d(?:[.]\d+)?e[+-]\d+\b"
    return rule if "image " in rule else re.sub(found, lambda number: compact(float(number[0])), rule)


def pictured(files: RunFiles, shown: Sequence[Group]) -> dict[str, Any]:
    """The gallery, its scales and the features, as the template shows them."""
    mean, sd = effects(files, files.speaker)
    names = files.cams["feature_obs_id"].values if "feature_obs_id" in files.cams else [""] * mean.shape[1]
    probability = shown_chance(shown[0].cases[0])
    return {
        "gallery": [_group(group) for group in shown],
        "tiles": dict(zip(TILES, ("radiograph", "evidence, mean", "its sd", probability.name), strict=True)),
        "probability": probability.words,
        "chance_colours": ", ".join(colour_stops(CHANCE)),
        "signed_colours": ", ".join(colour_stops(SIGNED)),
        "spread_colours": ", ".join(colour_stops(SPREAD)),
        "features": [
            {
                "number": number,
                "feature": d,
                "label": files.classes[k],
                "effect": float(mean[k, d]),
                "low": float(mean[k, d] - 1.645 * sd[k, d]),
                "high": float(mean[k, d] + 1.645 * sd[k, d]),
                "obs_id": str(name),
            }
            for number, ((k, d), name) in enumerate(zip(top_features(files), names, strict=False), 1)
        ],
        "has_features": "shown_feature" in files.cams.coords,
    }


def _group(group: Group) -> dict[str, Any]:
    title, measure = TITLES[group.name]
    cases = [
        {
            "number": number,
            "name": case.title,
            "wrong": case.truth != case.label,
            "lines": brief_caption(case),
            "full": caption(case),
        }
        for number, case in enumerate(group.cases, group.first)
    ]
    limit, spread = group.limit, group.spread
    return {
        "title": title,
        "measure": measure,
        "remark": group.remark,
        "open": cases[:_OPEN],
        "folded": cases[_OPEN:],
        "left_out": group.left_out,
        "signed": [-limit, -limit / 2, 0.0, limit / 2, limit],
        "spread": [0.0, spread / 2, spread],
        "beyond": group.beyond,
    }


def figures(files: RunFiles, shown: Sequence[Group]) -> dict[str, str]:
    """Every picture of the page as a data URI."""
    names = list(FIGURES) + (["seeds"] if files.seeds is not None else [])
    names += [
        tile_name(number, tile)
        for group in shown
        for number in range(group.first, group.first + len(group.cases))
        for tile in TILES
    ]
    if "shown_feature" in files.cams.coords:
        names += [f"feature-{number}" for number in range(1, 1 + files.cams.sizes["shown_feature"])]
    found = {name: files.folder / "figures" / f"{name}.png" for name in names}
    for path in found.values():
        if not path.is_file():
            raise FileFormatError(f"{path}: missing; restore it or run again")
    return {name: _data_uri(path) for name, path in found.items()}


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
