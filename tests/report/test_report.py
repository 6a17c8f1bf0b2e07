"""The report: one file that a browser draws without asking anyone, made from the run folder alone."""

from __future__ import annotations

import base64
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
from bayescam.errors import BayescamError
from bayescam.report.figures import (
    confusion_figure,
    reliability_figure,
    risk_coverage_figure,
    trace_figure,
    training_figure,
    weights_figure,
)
from bayescam.report.html import write_report
from bayescam.report.model_card import write_model_card

HOSTILE = ['"><script>alert(1)</script>', r"$\badcmd$ {{7*7}}", "<b>bold</b>"]
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
        self.tags, self.images, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "src":
                self.images.append(value)
            if name in ("href", "action", "srcset", "data"):
                self.links.append(value)
            assert not name.startswith("on"), name

    def handle_data(self, data):
        self.text.append(data)


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


@pytest.mark.slow
class TestReport:
    def test_the_page_is_whole_inert_and_alone(self, run_folder):
        source = (run_folder / "report.html").read_text(encoding="utf-8")
        page = Page()
        page.feed(source)
        assert len(source) < 10 * 2**20
        assert not {"script", "iframe", "object", "embed", "link", "form", "b", "a"} & set(page.tags)
        assert page.links == []
        assert len(page.images) == 7 + 1 + 6  # the figures, the scales and the gallery
        for uri in page.images:
            kind, content = uri.split(",", 1)
            assert kind == "data:image/png;base64"
            with Image.open(BytesIO(base64.b64decode(content))) as picture:
                picture.load()
        assert not re.search(r"https?://", source)
        assert "Content-Security-Policy" in source
        for name in HOSTILE:
            assert name in "".join(page.text)

    def test_every_number_is_the_runs(self, run_folder):
        page = Page()
        page.feed((run_folder / "report.html").read_text(encoding="utf-8"))
        words = " ".join(page.text)
        metrics = json.loads((run_folder / "metrics.json").read_text())
        card = (run_folder / "MODEL_CARD.md").read_text()
        for row in metrics["methods"].values():
            for key in ("accuracy", "nll", "ece", "brier"):
                assert f"{row[key]:z.4f}" in words
                assert f"{row[key]:z.4f}" in card
        comparison = json.loads((run_folder / "comparison.json").read_text())
        assert comparison["words"] in words
        assert metrics["resampled"] == "images"  # the manifest names no patient
        assert "split by images, which name no patient" in words
        assert re.search(r"interval over \d+ images\. .*ECE is biased upwards in small samples; its interval", card)
        assert re.search(r"interval over \d+ images\. .*ECE is biased upwards in small samples; its interval", words)
        assert str(metrics["num_resampled"]) in re.findall(r"interval over (\d+) images", card)
        for row in comparison["predictive"].values():
            for key in ("total_variation", "agreement", "nll_difference", "ece_difference"):
                assert f"{row[f'{key}_low']:z.4f} to {row[f'{key}_high']:z.4f}" in words
                assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        for row in metrics["uncertainty"].values():
            assert set(row) <= {f"{a}{b}" for a in ("entropy", "mutual_information") for b in ("", "_finds_errors")}
            for one in row.values():
                assert f"{one['low']:z.4f} to {one['high']:z.4f}" in words
        assert "mutual_information" in metrics["uncertainty"]["nuts"]
        assert "mutual_information" not in metrics["uncertainty"]["map"]
        surest = metrics["intervals"]["nuts"]["error_surest_80"]
        assert f"{surest['low']:z.4f} to {surest['high']:z.4f}" in words

    def test_the_parts_of_brier_are_shown_and_add_up_to_it(self, run_folder):
        words = (run_folder / "report.html").read_text(encoding="utf-8")
        for row in json.loads((run_folder / "metrics.json").read_text())["intervals"].values():
            parts = [
                row[f"brier_{name}"]["value"] for name in ("reliability", "resolution", "uncertainty", "remainder")
            ]
            assert parts[0] - parts[1] + parts[2] + parts[3] == pytest.approx(row["brier"]["value"], abs=1e-9)
            for part in parts:
                assert f">{part:z.4f}<small>" in words

    def test_where_there_is_no_interval_it_says_so(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")

        def without(value: object) -> object:
            if not isinstance(value, dict):
                return value
            return {k: None if k.endswith(("low", "high")) else without(one) for k, one in value.items()}

        for name in ("metrics.json", "comparison.json", "seeds.json"):
            stored = json.loads((run_folder / name).read_text())
            (tmp_path / "r" / name).write_text(json.dumps(without(stored), allow_nan=False))
        page = write_report(tmp_path / "r").read_text(encoding="utf-8")
        assert "(no interval, for want of a second image)" in page
        assert re.search(r"\d<small>no interval</small>", page)
        assert "% (no interval) of the test images keep" in page
        assert "None to" not in page
        card = write_model_card(tmp_path / "r").read_text(encoding="utf-8")
        assert re.search(r"\| \d\.\d{4} \[-\] \|", card)

    def test_every_number_of_the_table_has_its_interval(self, run_folder):
        metrics = json.loads((run_folder / "metrics.json").read_text())
        rows = [line for line in (run_folder / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
        assert len(rows) == len(metrics["methods"])
        for row, found in zip(rows, metrics["intervals"].values(), strict=True):
            nll = found["nll"]
            assert f"{nll['value']:z.4f} [{nll['low']:z.4f}, {nll['high']:z.4f}]" in row
            assert row.count("[") == 4

    def test_the_limits_say_how_far_another_training_moves(self, run_folder, tmp_path):
        seeds = json.loads((run_folder / "seeds.json").read_text())
        assert seeds["num_trainings"] == 2
        assert "2 trainings of the same network" in (run_folder / "report.html").read_text(encoding="utf-8")
        shutil.copytree(run_folder, tmp_path / "r")
        (tmp_path / "r/seeds.json").unlink()
        assert "was not measured" in write_report(tmp_path / "r").read_text(encoding="utf-8")

    def test_written_again_it_is_the_same(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        before = (tmp_path / "r/report.html").read_bytes()
        assert write_report(tmp_path / "r").read_bytes() == before
        assert write_model_card(tmp_path / "r").read_bytes() == (run_folder / "MODEL_CARD.md").read_bytes()

    def test_a_missing_file_is_named(self, run_folder, tmp_path):
        shutil.copytree(run_folder, tmp_path / "r")
        (tmp_path / "r/metrics.json").unlink()
        with pytest.raises(BayescamError, match=r"metrics\.json"):
            write_report(tmp_path / "r")
        shutil.copy(run_folder / "metrics.json", tmp_path / "r/metrics.json")
        (tmp_path / "r/figures/case-2.png").unlink()
        with pytest.raises(BayescamError, match=r"case-2\.png: missing"):
            write_report(tmp_path / "r")

    def test_chromium_draws_it_without_a_word_or_a_request(self, run_folder, tmp_path):
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if browser is None:
            pytest.skip("no Chromium on this machine")
        log = tmp_path / "net.json"
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--enable-logging=stderr",
                f"--log-net-log={log}",
                "--window-size=1100,3000",
                f"--screenshot={tmp_path / 'shot.png'}",
                (run_folder / "report.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
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
    ]
    for figure in figures:
        out = BytesIO()
        figure.savefig(out, format="png")
        assert out.tell() > 1000
