"""How numbers are written, what they are said to mean, and what a name may not do in Markdown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from bayescam.diagnose.diagnosis import Diagnosis
from bayescam.diagnose.run_checks import Check
from bayescam.report.glossary import GLOSSARY, term_of_check
from bayescam.report.html import check_rows
from bayescam.report.judgement import consequence, far_from_map, soundness, trainings
from bayescam.report.model_card import plain
from bayescam.report.wording import chance, compact, fixed, listed, percent, tight, two_digits


def test_shares_and_chances_never_round_to_certainty():
    assert [percent(share) for share in (0, 0.001, 0.5, 0.996, 1)] == ["0 %", "< 1 %", "50 %", "> 99 %", "100 %"]
    assert [chance(p) for p in (0.0, 0.004, 0.126, 0.994, 0.998, 1.0)] == [
        *("< 0.01", "< 0.01", "0.13", "0.99", "> 0.99", "> 0.99")
    ]


def test_two_significant_digits():
    values = {0.1849: "0.18", 2.55: "2.5", 14.77: "15", 134.0: "130", 0.998: "1.0", 0.0: "0", -0.051: "-0.051"}
    assert {value: two_digits(value) for value in values} == values
    assert two_digits(None) == two_digits(float("nan")) == "–"


def test_numbers_of_any_size_take_little_room():
    values = {1.0123: "1.012", 2463: "2,463", 82590.4: "82,590", 3.14e-7: "3.1 × 10⁻⁷", 0: "0", 2e12: "2.0 × 10¹²"}
    assert {value: compact(value) for value in values} == values
    assert compact(float("inf")) == "infinite"
    assert compact(float("nan")) == "–"
    assert fixed(-0.00001, 3) == "0.000"


def test_lists_are_sentences_and_units_stay_with_their_numbers():
    assert [listed(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert tight("p > 0.99, 4 ± 1, 90 % of it") == "p >\u00a00.99, 4\u00a0±\u00a01, 90\u00a0% of it"


def _files(map_row: dict, verdict: str = "refine") -> SimpleNamespace:
    return SimpleNamespace(
        verdict=verdict,
        limits={"total_variation": 0.01, "nll_difference": 0.02},
        comparison={"predictive": {"map": map_row}},
    )


def test_whether_it_matters_is_said_of_the_map_by_the_verdicts_rule():
    row = {"total_variation": 0.0056, "agreement": 0.997, "nll_difference": 0.015, "ece_difference": 0.011}
    assert consequence(_files(row)).startswith("For the class and its probability, hardly: ")
    assert "the same class in > 99 % of the images" in consequence(_files(row))
    far = consequence(_files(row | {"nll_difference": -0.021}))
    assert far.startswith("Yes: ")
    assert "its NLL is 0.0210 lower than that of NUTS, its ECE 0.0110 higher" in far
    assert "cannot be told" in consequence(_files(row, "undecided"))


def test_a_gaussian_that_names_other_classes_than_the_map_is_explained():
    sure, spread = np.eye(3)[[0, 1, 2, 0]], np.full((4, 3), [0.2, 0.3, 0.5])
    probs = {name: sure for name in ("map", "laplace_diag", "laplace_kron", "laplace_refined")} | {
        "laplace_full": spread
    }
    metrics = {"methods": {name: {"accuracy": 1.0} for name in probs}}
    metrics["methods"]["laplace_full"]["accuracy"] = 0.25
    words = far_from_map(SimpleNamespace(probs=probs.__getitem__, metrics=metrics))
    assert words.startswith(
        "Another class than the MAP (accuracy 1.000) is named by Laplace, full in 75 % of the images (accuracy 0.250)."
    )
    probs["laplace_full"] = sure
    assert far_from_map(SimpleNamespace(probs=probs.__getitem__, metrics=metrics)) == ""


def _diagnosis(nuts: float = 0.0, laplace: float = 0.0, verdict: str = "refine") -> Diagnosis:
    checks = (
        Check.of("nuts", "divergent transitions", nuts, "at most", 0),
        Check.of("laplace", "total variation to NUTS", laplace, "at most", 0.01),
        Check.of("refined", "total variation to NUTS", 0.0, "at most", 0.01),
        Check.of("refined", "Pareto k-hat", 2.0, "at most", 0.7, decides=False),
        Check.skipped("refined", "KL to the posterior", "no training images", decides=False),
    )
    return Diagnosis("r", checks, verdict)


def test_a_posterior_that_nobody_recommends_does_not_make_the_run_unsound():
    found = soundness(_diagnosis(laplace=0.5))
    assert found.sound
    assert found.words == "NUTS and the refined Gaussian pass all of their checks."
    assert found.brief == f"Yes: {found.words}"
    assert found.others == "Not recommended, and not passing: the Laplace posterior (total variation to NUTS)."
    assert found.counts == "2 checks pass, 1 fail, 1 noted, 1 could not be made."


def test_a_doubt_about_nuts_is_said_with_what_would_settle_it():
    found = soundness(_diagnosis(nuts=3))
    assert not found.sound
    assert found.words == (
        "The refined Gaussian passes all of its checks. With a doubt: NUTS fails divergent transitions. More draws "
        "would settle that, or smaller steps where transitions diverge."
    )
    assert found.brief == "Not for sure: NUTS fails 1 of its checks."
    undecided = soundness(_diagnosis(verdict="undecided"))
    assert undecided.brief == "Not for sure: NUTS has not converged."
    assert undecided.words.startswith(
        "NUTS passes all of its checks. By the comparison, over all test images, NUTS has not converged. More draws"
    )


def test_what_other_trainings_change_is_said_to_two_digits():
    names = ("same_class", "map_correlation", "map_sd_ratio", "map_sd_between", "map_sd_posterior")
    seeds = dict.fromkeys(names, 0.1849) | {"accuracy": [0.9951, 0.9949], "nll": [0.18, 0.221], "map_images": 64}
    seeds["intervals"] = {name: {"low": 0.1712, "high": 0.2049} for name in names}
    first, second, third = trainings(SimpleNamespace(seeds=seeds))
    assert first.startswith("Accuracy 0.995 in each, NLL 0.1800 to 0.2210; 18 % [17 %, 20 %] of the test images")
    assert "correlate with this run's by 0.18 [0.17, 0.20]." in second
    assert "0.18 [0.17, 0.20] times its posterior sd" in third
    assert trainings(SimpleNamespace(seeds=None)) == []


def test_a_rule_has_few_digits_and_an_images_name_all_of_its_own():
    rules = (" nat; 1.77e+04 nat in all, give or take 2.6e+02", "; image 1e-05 b", ", the rounding of 8 numbers")
    checks = [Check.of("nuts", "E-BFMI", 3.14e-7, "above", 8.66e-14, rule) for rule in rules]
    (group,) = check_rows(Diagnosis("r", tuple(checks), "refine"))
    assert [row["rule"] for row in group["checks"]] == [
        "above 8.7 × 10⁻¹⁴ nat; 17,700 nat in all, give or take 260",
        "above 8.66e-14; image 1e-05 b",
        "above 8.7 × 10⁻¹⁴, the rounding of 8 numbers",
    ]
    assert group["checks"][0]["number"] == "3.1 × 10⁻⁷"


def test_every_check_has_a_term_and_every_term_words():
    names = (
        "R-hat, centred weights|bulk ESS, log joint|E-BFMI, worst chain|divergent transitions|gradient norm at the MAP"
    )
    names += "|transitions at maximum tree depth|smallest / largest pivot of the precision"
    names += "|Newton decrement at the MAP"
    names += "|Pareto k-hat, median over 4 x 250 draws|KL to the posterior, nat a parameter|total variation to NUTS"
    assert all(term_of_check(name) in GLOSSARY for name in names.split("|"))
    assert term_of_check("chains") is None
    assert all(len(term.words) > 20 for term in GLOSSARY.values())


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("[a](http://b.c)", r"\[a\](http\://b.c)"),
        ("**x** `y` <img> $z$ | ~~w~~ &lt; # h", r"\*\*x\*\* \`y\` \<img\> \$z\$ \| \~\~w\~\~ \&lt; \# h"),
        ("Elbow joint, lateral (adult) - No. 1!", "Elbow joint, lateral (adult) - No. 1!"),
        ("www.a.b me@c.d", r"www\.a.b me\@c.d"),
    ],
)
def test_names_in_markdown_are_escaped_no_more_than_they_need(name, written):
    assert plain(name) == written
