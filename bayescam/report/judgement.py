"""What the run's numbers mean, in sentences: what to use, whether it matters, what not to trust."""

from __future__ import annotations

from dataclasses import dataclass

from bayescam.diagnose.diagnosis import Diagnosis
from bayescam.report.run_files import RunFiles
from bayescam.report.wording import NAMES, fixed, listed, percent, two_digits

HEADLINES = {
    "laplace": "Use the Laplace posterior: it predicts like NUTS, the reference.",
    "refine": "Use the refined Gaussian: it predicts like NUTS, the reference. The Laplace posterior does not.",
    "nuts": "Use the draws of NUTS, the reference: neither Gaussian posterior predicts like them.",
    "undecided": "None can be recommended: NUTS, the reference, has not converged. The numbers here are the refined "
    "Gaussian's, which nothing has checked.",
}
SPOKEN = {"laplace_full": "the Laplace posterior", "laplace_refined": "the refined Gaussian", "nuts": "NUTS"}
SUBJECTS = {
    "nuts": "NUTS",
    "nuts_hierarchical": "NUTS with tau sampled",
    "laplace": "the Laplace posterior",
    "refined": "the refined Gaussian",
    "comparison": "the comparison",
}
_ALIKE = 0.9  # of the images in which a Gaussian must name the class that the MAP names


def close_enough(files: RunFiles, name: str) -> bool:
    """Whether one row of ``comparison.json`` predicts like NUTS by the verdict's rule."""
    row = files.comparison["predictive"][name]
    return all(abs(row[key]) <= limit for key, limit in files.limits.items())


def consequence(files: RunFiles) -> str:
    """Does it matter which is used? The single best weights beside the posterior, in predictions."""
    if files.verdict == "undecided":
        return "That cannot be told without a reference; draw more, or take --preset thorough."
    row = files.comparison["predictive"]["map"]
    same = f"the same class in {percent(row['agreement'])} of the images"
    if close_enough(files, "map"):
        return (
            f"For the class and its probability, hardly: the last layer at its single best weights (MAP) is as close "
            f"to NUTS by the same rule, with {same}. What the posterior adds is how sure that is: intervals of the "
            "probabilities, and error bars of the maps."
        )
    return (
        f"Yes: the last layer at its single best weights (MAP) gives {same}, but other probabilities, by "
        f"{fixed(row['total_variation'], 4)} on average; its NLL is {_more(row['nll_difference'])} than that of NUTS, "
        f"its ECE {_more(row['ece_difference'])}."
    )


def far_from_map(files: RunFiles) -> str:
    """Where a Laplace posterior names another class than the MAP in many images: which, and why; else nothing."""
    best = files.probs("map").argmax(1)
    share = {name: float((files.probs(name).argmax(1) != best).mean()) for name in NAMES if name.startswith("laplace_")}
    far = [name for name, other in share.items() if other > 1 - _ALIKE and name != "laplace_refined"]
    if not far:
        return ""
    accuracy = {name: fixed(files.metrics["methods"][name]["accuracy"], 3) for name in [*far, "map"]}
    parts = [f"{NAMES[name]} in {percent(share[name])} of the images (accuracy {accuracy[name]})" for name in far]
    return (
        f"Another class than the MAP (accuracy {accuracy['map']}) is named by {listed(parts)}. This network is "
        "confident: far around the MAP its likelihood hardly changes, so that a Gaussian as wide as the curvature says "
        "reaches weights that predict nothing of the kind. The refined Gaussian is made for this."
    )


@dataclass(frozen=True)
class Soundness:
    """Whether the run may be relied on.

    Args:
        sound: NUTS and the posterior that the verdict recommends pass their checks.
        brief: that, in a sentence without a term of the checks.
        words: that, in a sentence, with what fails.
        others: what fails of the posteriors that are not recommended, or nothing.
        counts: how many checks pass, fail, and are noted.
    """

    sound: bool
    brief: str
    words: str
    others: str
    counts: str


def soundness(diagnosis: Diagnosis) -> Soundness:
    """The diagnosis in words; a note, or a check that could not be made, is not counted as passed or failed."""
    wanted = list(dict.fromkeys(["nuts", *([diagnosis.recommended] if diagnosis.recommended else [])]))
    open_ = {
        subject: [
            one.name
            for one in diagnosis.checks
            if one.subject == subject and (one.word == "FAIL" or (one.word == "skip" and one.decides))
        ]
        for subject in dict.fromkeys(check.subject for check in diagnosis.checks)
    }
    good = [SUBJECTS[name] for name in wanted if not open_.get(name)]
    parts = []
    if good:
        passes = "passes all of its checks" if len(good) == 1 else "pass all of their checks"
        parts.append(f"{listed(good)} {passes}.")
    parts += [f"With a doubt: {SUBJECTS[name]} fails {'; '.join(open_[name])}." for name in wanted if open_.get(name)]
    if diagnosis.verdict == "undecided":
        parts.append("By the comparison, over all test images, NUTS has not converged.")
    if open_.get("nuts") or diagnosis.verdict == "undecided":
        parts.append("More draws would settle that, or smaller steps where transitions diverge.")
    doubts = [f"{SUBJECTS[name]} fails {len(open_[name])} of its checks" for name in wanted if open_.get(name)]
    if diagnosis.verdict == "undecided":
        doubts.insert(0, "NUTS has not converged")
    brief = f"Yes: {parts[0]}" if diagnosis.sound else f"Not for sure: {listed(doubts or ['nothing is recommended'])}."
    others = [f"{SUBJECTS.get(n, n)} ({'; '.join(names)})" for n, names in open_.items() if names and n not in wanted]
    rest = f"Not recommended, and not passing: {listed(others)}." if others and diagnosis.recommended else ""
    words = [check.word for check in diagnosis.checks]
    counts = f"{words.count('pass')} checks pass, {words.count('FAIL')} fail"
    for word, said in (("note", "noted"), ("skip", "could not be made")):
        counts += f", {words.count(word)} {said}" if word in words else ""
    said = " ".join(part[0].upper() + part[1:] for part in parts)
    return Soundness(diagnosis.sound, brief, said, rest, counts + ".")


def trainings(files: RunFiles) -> list[str]:
    """What other trainings of the network change, a sentence a line; nothing where there was none."""
    seeds = files.seeds
    if seeds is None:
        return []
    within = seeds["intervals"]

    def number(name: str) -> str:
        low, high = (two_digits(within[name][end]) for end in ("low", "high"))
        interval = "no interval" if within[name]["low"] is None else f"{low}, {high}"
        return f"{two_digits(seeds[name])} [{interval}]"

    same = within["same_class"]
    share = "no interval" if same["low"] is None else f"{percent(same['low'])}, {percent(same['high'])}"
    return [
        f"Accuracy {_reached(seeds['accuracy'], 3)}, NLL {_reached(seeds['nll'], 4)}; {percent(seeds['same_class'])} "
        f"[{share}] of the test images keep their most probable class.",
        f"The maps of that class in {seeds['map_images']} test images correlate with this run's by "
        f"{number('map_correlation')}.",
        f"A cell of a map moves by {number('map_sd_between')} logits (sd) from training to training, "
        f"{number('map_sd_ratio')} times its posterior sd, {number('map_sd_posterior')}, which does not know of that.",
    ]


def _reached(values: list[float], digits: int) -> str:
    low, high = fixed(min(values), digits), fixed(max(values), digits)
    return f"{low} in each" if low == high else f"{low} to {high}"


def _more(difference: float) -> str:
    return f"{fixed(abs(difference), 4)} {'higher' if difference > 0 else 'lower'}"
