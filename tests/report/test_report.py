"""The report: one file that a browser draws without asking anyone, made from the run folder alone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayescam.cli import main
from bayescam.diagnose.compare import SPEAKERS
from bayescam.diagnose.intervals import Interval
from bayescam.errors import BayescamError
from bayescam.report.figures import (
    agreement_figure,
    confusion_figure,
    distance_figure,
    reliability_figure,
    risk_coverage_figure,
    seeds_figure,
    trace_figure,
    training_figure,
    weights_figure,
)
from bayescam.report.gallery import gallery
from bayescam.report.html import write_report
from bayescam.report.model_card import write_model_card
from bayescam.report.pages import write_pages
from bayescam.report.run_files import RunFiles
from bayescam.report.wording import NAMES, digits_of
from bayescam.storage import load_netcdf

HOSTILE = ['"><script>alert(1)</script>', r"$\badcmd$ {{7*7}}", "<i>sloping</i>"]
SETTINGS = """
seeds = 1
[data]
image_size = 32
[train]
epochs = 1
[nuts]
num_chains = 2
num_samples = 20
num_warmup = 20
[posterior]
num_samples = 30
[explain]
num_images = 6
"""


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.images, self.links, self.ids, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "src":
                self.images.append(value)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "action", "srcset", "data"):
                self.links.append(value)
            assert not name.startswith("on"), name

    def handle_data(self, data):
        self.text.append(data)


def _read(path: Path) -> tuple[Page, str]:
    """A page, and its words with a space for each space there is."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page, " ".join(" ".join(page.text).split())


def _page(run: Path) -> str:
    return _read(write_report(RunFiles(run)))[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run on three classes whose names are attacks."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    lines = ["path,label"]
    for label, name in enumerate(HOSTILE):
        for i in range(30):
            picture = rng.integers(0, 60, (40, 36)).astype(np.uint8)
            picture[:, 12 * label : 12 * label + 12] += 120
            file = f"{label}-{i}.png"
            Image.fromarray(picture).save(root / file)
            quoted = name.replace('"', '""')
            lines.append(f'{file},"{quoted}"')
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    (root / "settings.toml").write_text(SETTINGS)
    command = ["run", "--data", str(root / "manifest.csv"), "--config", str(root / "settings.toml")]
    assert main([*command, "--out", str(root / "r"), "--device", "cpu"]) == 0
    return root / "r"


def _chromium(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    quiet = "no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
    flags = [f"--{flag}" for flag in ("headless", *quiet.split(), "disable-dev-shm-usage", "hide-scrollbars")]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
class TestReport:
    def test_the_page_is_whole_inert_and_alone(self, run_folder):
        page, words = _read(run_folder / "report.html")
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        assert len(source) < 10 * 2**20
        assert not {"script", "iframe", "object", "embed", "link", "form", "i"} & set(page.tags)
        assert page.links
        assert {link[1:] for link in page.links} <= set(page.ids)  # each leads to a place of the page itself
        assert all(link.startswith("#") for link in page.links)
        assert len(set(page.ids)) == len(page.ids)
        assert len(page.images) == 9 + 1 + 6 + 4 * 6  # plots, the trainings', the features, the gallery's tiles
        for uri in page.images:
            kind, content = uri.split(",", 1)
            assert kind == "data:image/png;base64"
            with Image.open(BytesIO(base64.b64decode(content))) as picture:
                picture.load()
        assert not re.search(r"https?://", source)
        assert "Content-Security-Policy" in source
        for name in HOSTILE:
            assert name in words

    def test_the_plain_sentence_comes_first_and_the_verdict_is_not_said_twice(self, run_folder):
        _, words = _read(run_folder / "report.html")
        metrics = json.loads((run_folder / "metrics.json").read_text())
        comparison = json.loads((run_folder / "comparison.json").read_text())
        right = metrics["methods"][SPEAKERS[comparison["verdict"]]]["accuracy"]
        assert f"How good? Right in {100 * right:.1f} % of {metrics['num_test']} test images." in words
        first = words[: words.index("Data Predictions")]
        assert not re.search(r"R-hat|NLL -|total variation \d", first)
        assert words.count(comparison["words"]) == 1

    def test_every_term_that_is_used_is_explained(self, run_folder):
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        used = set(re.findall(r'href="#g-(\w+)"', source))
        explained = re.findall(r'id="g-(\w+)"><dt>[^<]+</dt><dd>[^<]{20,}', source)
        assert used == set(explained)
        assert len(explained) == len(set(explained))

    def test_every_case_is_named_with_its_truth_and_its_interval(self, run_folder):
        page, words = _read(run_folder / "report.html")
        cams = load_netcdf(run_folder / "cams.nc")
        classes = json.loads((run_folder / "metrics.json").read_text())["classes"]
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        alts = [html.unescape(alt) for alt in re.findall(r'alt="([^"]*)"', source)]
        for name, truth, probs in zip(cams["obs_id"].values, cams["y"].values, cams["probs"].values, strict=True):
            assert str(name) in words
            right = truth == probs.argmax()
            said = f"Truth and prediction {classes[truth]}, " if right else f"Truth {classes[truth]}; predicted "
            assert said in words
            assert any(said in alt for alt in alts)
        assert len(re.findall(r"\[(?:>\s)?[01][.]\d\d, [01][.]\d\d\]", words)) >= len(cams["obs_id"])
        assert page.text.count("right") + page.text.count("wrong") == len(cams["obs_id"])

    def test_the_intervals_are_those_of_the_draws(self, run_folder):
        files = RunFiles(run_folder)
        rows = files.rows_of(files.cams["obs_id"].values)
        low, high = files.credible("nuts", rows)
        probs = load_netcdf(run_folder / "posterior/nuts.nc", "predictions")["probs"].values[:, :, rows]
        assert np.abs(low - np.quantile(probs, 0.05, axis=(0, 1))).max() < 1e-5
        assert np.abs(high - np.quantile(probs, 0.95, axis=(0, 1))).max() < 1e-5

    @pytest.mark.parametrize("verdict", ["laplace", "refine", "nuts", "undecided"])
    def test_one_posterior_speaks_throughout(self, run_folder, tmp_path, verdict):
        shutil.copytree(run_folder, tmp_path / "r")
        stored = json.loads((run_folder / "comparison.json").read_text())
        (tmp_path / "r/comparison.json").write_text(json.dumps(stored | {"verdict": verdict}))
        files = RunFiles(tmp_path / "r")
        words = _page(tmp_path / "r")
        speaker = SPEAKERS[verdict]
        own = files.metrics["intervals"][speaker]
        spoken = {"laplace_full": "the Laplace posterior", "laplace_refined": "the refined Gaussian", "nuts": "NUTS"}
        assert f"Right in {100 * own['accuracy']['value']:.1f} %" in words
        assert f"accuracy , {NAMES[speaker]}" in words
        assert f"Shaded: {spoken[speaker]}, whose numbers this page speaks of" in words
        assert f"What is taken for what by {spoken[speaker]}" in words
        assert f"Shaded: the 90 % interval of {spoken[speaker]}" in words
        assert f"of its most probable class, from {spoken[files.mapped]}" in words
        card = write_model_card(files).read_text(encoding="utf-8")
        assert f"Accuracy by class, {spoken[speaker]}" in card

    def test_every_number_is_the_runs(self, run_folder):
        _, words = _read(run_folder / "report.html")
        metrics = json.loads((run_folder / "metrics.json").read_text())
        card = (run_folder / "MODEL_CARD.md").read_text()
        for row in metrics["methods"].values():
            for key in ("accuracy", "nll", "ece", "brier"):
                assert f"{row[key]:z.{digits_of(key)}f}" in words
                assert f"{row[key]:z.{digits_of(key)}f}" in card
        comparison = json.loads((run_folder / "comparison.json").read_text())
        assert comparison["words"] in words
        assert comparison["words"] in card  # as it is, without a backslash
        for limit in ("total_variation", "nll_difference"):
            assert f"{comparison['thresholds'][limit]:.4f}" in words
        assert metrics["resampled"] == "images"  # the manifest names no patient
        assert "split by images, which name no patient" in words
        assert "No image names its patient: the same person may be in both" in words
        assert "name no patient" in card
        assert re.search(r"interval over \d+ images\. .*ECE is biased upwards in small samples; its interval", card)
        assert re.search(r"interval over \d+ images\. .*ECE is biased upwards in small samples; its interval", words)
        assert str(metrics["num_resampled"]) in re.findall(r"interval over (\d+) images", card)
        for row in comparison["predictive"].values():
            for key in ("total_variation", "agreement", "nll_difference", "ece_difference"):
                digits = digits_of(key)
                assert f"{row[f'{key}_low']:z.{digits}f} to {row[f'{key}_high']:z.{digits}f}" in words
                assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        for row in metrics["uncertainty"].values():
            assert set(row) <= {f"{a}{b}" for a in ("entropy", "mutual_information") for b in ("", "_finds_errors")}
            for one in row.values():
                assert f"{one['low']:z.4f} to {one['high']:z.4f}" in words
        assert "mutual_information" in metrics["uncertainty"]["nuts"]
        assert "mutual_information" not in metrics["uncertainty"]["map"]
        surest = metrics["intervals"]["nuts"]["error_surest_80"]
        assert f"{surest['low']:z.3f} to {surest['high']:z.3f}" in words
        split = json.loads((run_folder / "data.json").read_text())["counts"]
        totals = " ".join(str(sum(split[part].values())) for part in ("train", "valid", "test"))
        assert f"all images {totals}" in words

    def test_what_was_left_out_is_named_and_who_is_unknown_is_said(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        facts = json.loads((run_folder / "data.json").read_text())
        facts |= {"skipped": ["a<i>.png: the file is empty"], "ignored": {"not an image by its suffix": 2}}
        facts |= {"equal_of_several_labels": [["0-1.png", "1-1.png"]]}
        (tmp_path / "r/data.json").write_text(json.dumps(facts))
        words = _page(tmp_path / "r")
        assert "1 unreadable image left out; 2 other files ignored" in words
        assert "left out: a<i>.png: the file is empty" in words
        assert "Equal images stand under several labels (0-1.png = 1-1.png)" in words
        card = write_model_card(RunFiles(tmp_path / "r")).read_text(encoding="utf-8")
        assert (
            r"2 ignored (not an image by its suffix); 1 unreadable and left out (a\<i\>.png: the file is empty)" in card
        )

    def test_equal_prints_are_bold_together(self, run_folder):
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        table = source[source.index('id="predictions"') : source.index('id="maps"')]
        for column in range(4):
            cells = [re.findall(r'<td( class="best")?>([^<]+)<small>', row)[:4] for row in table.split("<tr")[1:]]
            shown = [row[column] for row in cells if len(row) == 4][:8]
            best = {value for mark, value in shown if mark}
            assert len(best) == 1
            assert all(bool(mark) == (value in best) for mark, value in shown)

    def test_a_run_of_an_older_bayescam_is_shown_without_what_it_lacks(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        shutil.rmtree(tmp_path / "r/figures")
        cams = load_netcdf(run_folder / "cams.nc")
        newer = [name for name in cams.variables if name.startswith(("feature_", "stands_out", "shown_feature"))]
        assert len(newer) >= 7
        cams.drop_vars(newer).to_netcdf(tmp_path / "r/cams.nc", engine="h5netcdf")
        timings = json.loads((run_folder / "timings.json").read_text())
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", timings.pop("finished"))
        (tmp_path / "r/timings.json").write_text(json.dumps(timings))
        write_pages(tmp_path / "r")
        page, words = _read(tmp_path / "r/report.html")
        assert len(page.images) == 9 + 1 + 4 * 6
        assert "P(evidence > 0), in all pictures" in words
        assert "Speaks for the class in" in words
        assert "stands out" not in words[: words.index("Every term, explained once")]

    def test_a_flat_map_stays_flat(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        cams = load_netcdf(run_folder / "cams.nc")
        for name in ("mean", "sd", "stands_out", "stands_out_jointly", "joint"):
            cams[name] = 0 * cams[name]
        cams["image"] = 0 * cams["image"] + 9
        cams.to_netcdf(tmp_path / "r/cams.nc", engine="h5netcdf")
        write_pages(tmp_path / "r")
        words = _read(tmp_path / "r/report.html")[1]
        assert words.count("is flat: no part of the picture speaks for it more than another.") == 6
        assert words.count("The image is one even grey") == 6
        for group in gallery(RunFiles(tmp_path / "r")):
            assert (group.limit, group.spread) == (1, 1)

    def test_the_parts_of_brier_are_shown_and_add_up_to_it(self, run_folder):
        words = (run_folder / "report.html").read_text(encoding="utf-8")
        table = words[words.index("Brier: reliability") :]
        for row in json.loads((run_folder / "metrics.json").read_text())["intervals"].values():
            parts = [
                row[f"brier_{name}"]["value"] for name in ("reliability", "resolution", "uncertainty", "remainder")
            ]
            assert parts[0] - parts[1] + parts[2] + parts[3] == pytest.approx(row["brier"]["value"], abs=1e-9)
            for part in parts:
                assert f">{part:z.4f}<small>" in table

    def test_where_there_is_no_interval_it_says_so(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")

        def without(value: object) -> object:
            if not isinstance(value, dict):
                return value
            return {k: None if k.endswith(("low", "high")) else without(one) for k, one in value.items()}

        for name in ("metrics.json", "comparison.json", "seeds.json"):
            stored = json.loads((run_folder / name).read_text())
            (tmp_path / "r" / name).write_text(json.dumps(without(stored), allow_nan=False))
        words = _page(tmp_path / "r")
        assert "no interval, for want of a second image" in words
        assert re.search(r"\d[.]\d{4} no interval ", words)
        assert "% [no interval] of the test images keep" in words
        assert "None to" not in words
        card = write_model_card(RunFiles(tmp_path / "r")).read_text(encoding="utf-8")
        assert re.search(r"\| \d\.\d{4} \[-\] \|", card)

    def test_every_number_of_the_table_has_its_interval(self, run_folder):
        metrics = json.loads((run_folder / "metrics.json").read_text())
        rows = [line for line in (run_folder / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
        assert len(rows) == len(metrics["methods"])
        for row, (name, found) in zip(rows, metrics["intervals"].items(), strict=True):
            nll = found["nll"]
            assert row.startswith(f"| {NAMES[name]} | ")
            assert f"{nll['value']:z.4f} [{nll['low']:z.4f}, {nll['high']:z.4f}]" in row
            assert row.count("[") == 4

    def test_how_far_another_training_moves_is_said(self, run_folder, tmp_path):
        seeds = json.loads((run_folder / "seeds.json").read_text())
        assert seeds["num_trainings"] == 2
        _, words = _read(run_folder / "report.html")
        assert "What would another training change? 2 trainings of the same network" in words
        assert "which does not know of that." in words
        assert "Other trainings" in (run_folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        shutil.copytree(run_folder, tmp_path / "r")
        (tmp_path / "r/seeds.json").unlink()
        assert "was not measured" in _page(tmp_path / "r")
        assert "was not measured" in write_model_card(RunFiles(tmp_path / "r")).read_text(encoding="utf-8")

    def test_how_it_was_made_can_be_followed(self, run_folder):
        _, words = _read(run_folder / "report.html")
        card = (run_folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        digest = hashlib.sha256((run_folder / "metrics.json").read_bytes()).hexdigest()[:12]
        environment = json.loads((run_folder / "environment.json").read_text())
        finished = json.loads((run_folder / "timings.json").read_text())["finished"]
        for text in (words, card):
            assert digest in text
            assert finished[:10] in text
            assert environment["packages"]["torch"] in text
        assert environment["platform"] in words
        assert "bayescam run --config config.toml --out again" in words
        assert re.search(r"\d+ s in all, without this report: data \d", words)

    def test_written_again_it_is_the_same(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        before = {name: (tmp_path / "r" / name).read_bytes() for name in ("report.html", "MODEL_CARD.md")}
        (tmp_path / "r/figures/case-2-sd.png").unlink()
        written = write_pages(tmp_path / "r")
        assert {path.name: path.read_bytes() for path in written} == before

    def test_a_missing_file_is_named(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        (tmp_path / "r/metrics.json").unlink()
        with pytest.raises(BayescamError, match=r"metrics\.json"):
            write_pages(tmp_path / "r")
        shutil.copy(run_folder / "metrics.json", tmp_path / "r/metrics.json")
        (tmp_path / "r/figures/case-2-sd.png").unlink()
        with pytest.raises(BayescamError, match=r"case-2-sd\.png: missing"):
            write_report(RunFiles(tmp_path / "r"))
        stored = json.loads((run_folder / "metrics.json").read_text())
        del stored["intervals"]["map"]["brier_remainder"]
        (tmp_path / "r/metrics.json").write_text(json.dumps(stored))
        with pytest.raises(BayescamError, match=r"lacks 'brier_remainder', as written by another bayescam; run again"):
            write_pages(tmp_path / "r")
        (tmp_path / "r/history.csv").unlink()
        with pytest.raises(BayescamError, match=r"history\.csv"):
            write_pages(tmp_path / "r")

    def test_every_section_is_listed_every_table_scrolls_and_no_plot_has_a_ground(self, run_folder):
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        contents = source[source.index("<nav") : source.index("</nav>")]
        sections = [name.removesuffix("-heading") for name in re.findall(r'<h2 id="([^"]+)"', source)]
        assert sections == re.findall(r'href="#([^"]+)"', contents)
        scrolling = r'<div class="scroll[^"]*" tabindex="0" role="region" aria-label="[^"]+"><table'
        assert len(re.findall(scrolling, source)) == source.count("<table") >= 5
        plots = re.findall(r'<img class="plot" src="data:image/png;base64,([^"]+)"', source)
        assert len(plots) == 10
        for plot in plots:
            with Image.open(BytesIO(base64.b64decode(plot))) as picture:
                assert picture.convert("RGBA").getpixel((0, 0))[3] == 0

    def test_nothing_leaves_a_narrow_page(self, run_folder, tmp_path):
        """At the width of a telephone the page is as wide as its window, whatever the names."""
        shot = tmp_path / "shot.png"
        narrow = tmp_path / "narrow.html"
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        narrow.write_text(source.replace("<html ", '<html style="width: 420px; background: #00ff00" ', 1))
        _chromium(tmp_path, f"--screenshot={shot}", "--window-size=700,12000", narrow.as_uri())
        with Image.open(shot) as opened:
            beside = np.asarray(opened.convert("RGB"))[:, 424:]
        assert (beside == beside[0, -1]).all()

    def test_chromium_draws_it_without_a_word_or_a_request(self, run_folder, tmp_path):
        log = tmp_path / "net.json"
        done = _chromium(
            tmp_path,
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            "--window-size=1100,3000",
            f"--screenshot={tmp_path / 'shot.png'}",
            (run_folder / "report.html").as_uri(),
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        with Image.open(tmp_path / "shot.png") as shot:
            assert len(np.unique(np.asarray(shot.convert("L")))) > 20
        requested = re.findall(r'"url":"(https?://[^"]+)"', log.read_text(errors="replace"))
        ours = [url for url in requested if "google" not in url and "gvt1" not in url]
        assert ours == []


def test_figures_draw_hostile_names_and_plain_numbers():
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(3), 60), rng.integers(0, 3, 60)
    history = {name: rng.random(4) for name in ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy")}
    figures = [
        reliability_figure({"cnn": probs, "nuts": probs}, labels),
        risk_coverage_figure({"cnn": probs}, labels),
        confusion_figure(probs, labels, HOSTILE),
        training_figure({"epoch": np.arange(4), **history}),
        weights_figure(
            {"nuts": (rng.normal(size=(3, 5)), np.ones((3, 5)))}, HOSTILE, {r"$\bad$": [(0, 1)], "b": [(2, 4), (1, 1)]}
        ),
        trace_figure(rng.normal(size=(2, 30)), rng.normal(size=(2, 30))),
        distance_figure({"map": Interval(0.02, 0.01, 0.03), "nuts": Interval(0.0, float("nan"), 1.0)}, 0.001, 0.01),
        agreement_figure({"laplace_full": (rng.normal(size=(3, 5)), np.ones((3, 5))) * 2}),
        seeds_figure(
            {
                "accuracy": [0.9, 0.9],
                "nll": [0.2, 0.3],
                "map_sd_posterior": 2.0,
                "map_sd_between": 1.0,
                "intervals": {
                    "map_sd_posterior": {"low": 1.0, "high": 3.0},
                    "map_sd_between": {"low": None, "high": None},
                },
            }
        ),
    ]
    for figure in figures:
        out = BytesIO()
        figure.savefig(out, format="png")
        assert out.tell() > 1000


def test_a_long_class_name_leaves_the_features_number():
    figure = weights_figure({"nuts": (np.zeros((2, 99)), np.ones((2, 99)))}, ["a" * 80, "b"], {"why": [(0, 98)]})
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == [f"{'a' * 11}…, feature 98"]


def test_epochs_are_whole_and_chains_of_one_hue_each():
    history = {name: np.ones(12) for name in ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy")}
    figure = training_figure({"epoch": np.arange(12), **history})
    figure.canvas.draw()
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())
    lines = trace_figure(np.ones((4, 30)), np.ones((4, 30))).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == 4


def test_few_images_in_a_bin_are_drawn_hollow():
    probs = np.array([[0.9, 0.1]] * 40 + [[0.6, 0.4]] * 2)
    axes = reliability_figure({"nuts": probs}, np.zeros(42, dtype=int)).axes[0]
    many, few = axes.collections[-2:]
    assert len(many.get_facecolor()) == 1
    assert len(few.get_facecolor()) == 0
    assert any("95 % of all" in text.get_text() for text in axes.texts)
