"""``MODEL_CARD.md``: what the model is for, made from, and how good it is; all numbers from the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bayescam.diagnose.intervals import Interval, count_groups, interval_words
from bayescam.report.html import HEADLINES, metric_rows
from bayescam.report.run_files import RunFiles
from bayescam.storage import write_text


def write_model_card(run_folder: Path) -> Path:
    """Write ``MODEL_CARD.md`` into a run folder from its files.

    Raises:
        BayescamError: a file of the run is missing or broken.
    """
    files = RunFiles(run_folder)
    data, metrics = files.data, files.metrics
    lines = [
        f"# Model card: {_plain(data['name'])}",
        "",
        *_banners(data),
        "**Use.** Research on how sure a radiograph classifier is, and of where it looks.",
        "Not a medical device, not for clinical use.",
        "",
        f"**Data.** {data['num_images']} images, {len(files.classes)} classes"
        f" ({', '.join(map(_plain, files.classes))}), split by {files.resampled}: train {metrics['num_train']},"
        f" valid {metrics['num_valid']}, test {metrics['num_test']}. Licence: {_plain(data['licence'])}.",
        "",
        "**Model.** A convolutional network, trained and frozen; its last linear layer has a Gaussian prior of"
        f" precision {metrics['prior_precision']:.4g} and the posteriors below.",
        "",
        f"**Verdict.** {HEADLINES[files.comparison['verdict']]} {_plain(files.comparison['words'])}",
        "",
        f"**Test split.** {metrics['num_test']} images."
        f" {interval_words(count_groups(files.patients), files.resampled)}",
        "",
        "| method | accuracy | NLL, nat | ECE, 15 bins | Brier |",
        "|---|---|---|---|---|",
    ]
    for row in metric_rows(files):
        cells = [f"{Interval(c['value'], c['low'], c['high']):.4f}" for c in row["cells"]]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "**Limits.** Only the last layer is uncertain: the network below it is one set of weights. Trained on the"
        " images named above and no others; other machines, projections and patients may differ. Class activation maps"
        " show what the network used, not what is the cause.",
        "",
    ]
    path = Path(run_folder) / "MODEL_CARD.md"
    write_text(path, "\n".join(lines))
    return path


def _banners(data: dict[str, Any]) -> list[str]:
    lines = []
    if not data["shareable"]:
        lines += [
            "**Do not share the images.** Their licence forbids it; `report.html`, `figures/` and `cams.nc` hold them.",
            "",
        ]
    if equal := data.get("equal_across_splits"):
        lines += [
            f"**Too good.** {len(equal)} images stand in several splits under different patients; so the numbers below"
            " are too good.",
            "",
        ]
    return lines


def _plain(text: str) -> str:
    """A name that Markdown neither formats nor links."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|~$&" else c for c in str(text))
