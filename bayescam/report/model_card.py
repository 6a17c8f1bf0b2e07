"""``MODEL_CARD.md``: what the model is for, made from, and how good it is; what the report says, in short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bayescam.diagnose.intervals import Interval
from bayescam.report.html import contents
from bayescam.report.run_files import RunFiles
from bayescam.report.wording import fixed
from bayescam.storage import write_text

_NAMED = 20  # of the images left out


def write_model_card(files: RunFiles) -> Path:
    """Write ``MODEL_CARD.md`` into a run folder from its files.

    Raises:
        BayescamError: a file of the run is missing or broken.
    """
    page = contents(files)
    parts = [f"# Model card: {plain(page['name'])}", *_banners(page), *_summary(page), *_data(page), *_model(page)]
    parts += [*_results(page), *_limits(page), *_made(page)]
    path = files.folder / "MODEL_CARD.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def plain(text: str) -> str:
    """A name that Markdown neither formats nor links."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~$&@]|:(?=//))", r"\\\1", str(text))
    return re.sub(r"(?i)(www)\.", r"\1\\.", escaped)


def _banners(page: dict[str, Any]) -> list[str]:
    parts = []
    if not page["data"]["shareable"]:
        parts.append(
            "**Do not share the images.** Their licence forbids it; `report.html`, `figures/` and `cams.nc` hold them."
        )
    if page["equal"]:
        parts.append(
            f"**Too good.** {len(page['equal'])} images stand in several splits under different patients; so the "
            "numbers below are too good."
        )
    if page["disputed"]:
        count = f", {len(page['disputed'])} times" if len(page["disputed"]) > 1 else ""
        parts.append(f"**Labels.** Equal images stand under several labels{count}.")
    if page["num_unnamed"]:
        parts.append(
            f"**Perhaps too good.** {page['num_unnamed']} of {page['data']['num_images']} images name no patient: the "
            "same person may be in both the training and the test images."
        )
    return parts


def _summary(page: dict[str, Any]) -> list[str]:
    accuracy = _percents(page["plain"]["accuracy"])
    wrong = _percents(page["plain"]["error_surest_80"])
    return [
        f"**In short.** Right in {accuracy} of {page['metrics']['num_test']} test images; of the 80 % it is surest of, "
        f"{wrong} are wrong (in brackets 90 % intervals over {page['num_resampled']} {page['resampled']}). "
        f"{page['headline']} Is the run sound? {page['soundness'].brief}",
        "**Use.** Research on how sure a radiograph classifier is, and of where it looks. Not a medical device, not "
        "for clinical use.",
    ]


def _data(page: dict[str, Any]) -> list[str]:
    data = page["data"]
    rows = ["| class | train | valid | test | accuracy |", "|---|---|---|---|---|"]
    for row in page["classes"]:
        rows.append(_row(plain(row["name"]), *row["counts"], _interval(row["accuracy"], 3)))
    rows.append(_row("all images", *page["totals"], _interval(page["plain"]["accuracy"], 3)))
    if sum(page["patients"]):
        rows.append(_row("patients", *page["patients"], ""))
    left_out = [f"{number} ignored ({what})" for what, number in data["ignored"].items()]
    if data["skipped"]:
        named = ", ".join(plain(one) for one in data["skipped"][:_NAMED])
        more = ", ..." if len(data["skipped"]) > _NAMED else ""
        left_out.append(f"{len(data['skipped'])} unreadable and left out ({named}{more})")
    files = f" Files: {'; '.join(left_out)}." if left_out else ""
    return [
        f"**Data.** {data['num_images']} images, {len(page['classes'])} classes, split by {page['resampled']}. "
        f"Licence: {plain(data['licence'])}.{files} Accuracy by class, {page['speaker']}:",
        "\n".join(rows),
    ]


def _model(page: dict[str, Any]) -> list[str]:
    network = page["settings"]["backbone"]
    begun = f", begun from the weights {plain(network['weights'])}" if network.get("weights") else ""
    return [
        f"**Model.** A convolutional network ({plain(network['name'])}{begun}), trained and frozen; its last "
        f"linear layer has a Gaussian prior of precision {page['metrics']['prior_precision']:.3g} and the posteriors "
        "below."
    ]


def _results(page: dict[str, Any]) -> list[str]:
    rows = ["| method | accuracy | NLL, nat | ECE, 15 bins | Brier |", "|---|---|---|---|---|"]
    rows += [_row(row["method"], *(_interval(one, one["digits"]) for one in row["cells"])) for row in page["rows"]]
    parts = [
        f"**Predictions.** {page['metrics']['num_test']} test images. {page['interval_words_in_brackets']}",
        "\n".join(rows),
    ]
    if page["far"]:
        parts.append(page["far"])
    parts += [f"**Against NUTS.** {page['words']}", f"**Does it matter?** {page['consequence']}"]
    if marker := page["marker"]:
        parts.append(
            f"**Lead marker.** In {marker['images']} test images that show marker and bones, the marker's cells "
            f"outrank the bones' with probability {fixed(marker['mean'], 2)} on average ({marker['interval']})."
        )
    if page["trainings"]:
        parts.append(f"**Other trainings.** {page['seeds']['num_trainings']} in all. {' '.join(page['trainings'])}")
    checks = page["soundness"]
    parts.append(f"**Checks.** {checks.words} {checks.counts} {checks.others}".rstrip())
    return parts


def _limits(page: dict[str, Any]) -> list[str]:
    untold = "" if page["trainings"] else " How far another training would move these numbers was not measured."
    return [
        "**Limits.** Only the last layer is uncertain: the network below it is one set of weights. It has seen the "
        "training images, so sureness on them is too high. Other machines, projections and patients may "
        "differ. Class activation maps show what the network used, not what is the cause, in cells of "
        f"1/{page['cams']['h'] * page['cams']['w']} of the picture.{untold}"
    ]


def _made(page: dict[str, Any]) -> list[str]:
    found, settings = page["environment"], page["settings"]
    packages = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "pyro-ppl", "arviz"))
    date = f"{page['finished'][:10]}; " if page["finished"] else ""
    return [
        f"**Made.** {date}bayescam {found['bayescam']}, Python {found['python']}, {packages}; preset "
        f"{settings['preset']}, seed {settings['seed']}, run {page['identity']}."
    ]


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _interval(one: dict[str, Any] | None, digits: int) -> str:
    return "–" if one is None else f"{Interval(one['value'], one['low'], one['high']):.{digits}f}"


def _percents(one: dict[str, Any]) -> str:
    if one["low"] is None:
        return f"{fixed(100 * one['value'], 1)} %"
    low, high = (fixed(100 * one[end], 1) for end in ("low", "high"))
    return f"{fixed(100 * one['value'], 1)} % [{low}, {high}]"
