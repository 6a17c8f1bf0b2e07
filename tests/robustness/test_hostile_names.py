"""Names are data: whatever classes, files and runs are called, nothing is executed, injected, or written elsewhere."""

from __future__ import annotations

import csv
import html.parser
import json
import os
import re

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

CLASSES = [
    "<img src=x onerror=alert(1)>{{7*7}}",
    b"=cmd() $\\badcmd$ \xff\xfe\n\x1b[31m",
    "-\"'><script>alert(1)<|script> {% include 'x' %} | **md** `code` [a](javascript:alert(1))",
]
FILES = [
    "<img src=x onerror=alert(1)>.png",
    '"><script>alert(1)<|script>.png',
    "{{7*7}}{% for x in y %}.png",
    "$\\badcmd$.png",
    "two\nlines.png",
    "\x1b[31mred\x07.png",
    b"\xff\xfe not UTF-8.png",
    "=cmd()|' -C calc'!A0.png",
    "-rf.png",
    "+1.png",
    "@sum(1).png",
    "..png",
    "x" * 251 + ".png",
    "é手\u202egnp.png",
]
RUN = "<b>run {{7*7}} $\\badcmd$ =1"


def _decoded(name: str | bytes) -> str:
    return os.fsdecode(name)


class _Nodes(html.parser.HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(driver, settings, tmp_path_factory):
    """A run over hostile class and file names, in a folder of a hostile name: (run, images, outcome)."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("shared", Path(__file__).with_name("conftest.py"))
    shared = module_from_spec(spec)
    spec.loader.exec_module(shared)
    home = tmp_path_factory.mktemp("hostile")
    images = home / "im<b>ages {{7*7}}"
    shared.fill(images, CLASSES)
    for label, name in enumerate(CLASSES):
        for number, file in enumerate(FILES):
            Image.fromarray(shared.draw(label, 100 + number)).save(images / _decoded(name) / _decoded(file), "PNG")
    outcome = driver.run("run", "--config", settings(images), "--out", home / RUN, cache=home / "cache")
    assert outcome.status == 0, outcome.err
    return home / RUN, images, outcome


@pytest.fixture(scope="module")
def plain(driver, settings, tiny, tmp_path_factory):
    """A run like it over ordinary names; its figures are blank."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert driver.sketch("run", "--config", settings(tiny), "--out", out, cache=out.parent / "cache").status == 0
    return out


def _files(run):
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def test_no_output_path_is_made_from_an_input_name(hostile, plain):
    run, images, _ = hostile
    assert _files(run) == _files(plain)
    assert sorted(path.name for path in run.parent.iterdir()) == sorted([run.name, images.name, "cache"])


def test_the_report_has_no_node_that_a_plain_one_has_not(hostile, plain):
    found, wanted = (_Nodes((run / "report.html").read_text(encoding="utf-8")) for run in (hostile[0], plain))
    assert found.tags <= wanted.tags
    assert "script" not in found.tags
    assert {name for name, _ in found.attributes} <= {name for name, _ in wanted.attributes}
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#")), value[:80]
    assert "{{7*7}}" in found.text
    assert "<img src=x onerror=alert(1)>" in found.text


def test_every_text_is_free_of_control_characters(hostile):
    run, _, outcome = hostile
    texts = [path for path in run.rglob("*") if path.suffix in (".html", ".md", ".csv", ".json", ".toml")]
    assert len(texts) >= 8
    for path in texts:
        text = path.read_text(encoding="utf-8")
        broken = [c for c in text if not c.isprintable() and c != "\n"]
        assert not broken, f"{path.name}: {broken[:3]!r}"
    assert "\x1b[31m" not in outcome.out + outcome.err


def test_tables_are_inert_and_one_row_an_image(hostile):
    run, _, _ = hostile
    with (run / "split.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    hidden = sum(_decoded(file).startswith(".") for file in FILES)
    assert len(rows) == 1 + len(CLASSES) * (30 + len(FILES) - hidden)
    assert len({row[0] for row in rows}) == len(rows)
    for table in run.rglob("*.csv"):
        with table.open(encoding="utf-8", newline="") as stream:
            for row in csv.reader(stream):
                assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in row), row
                assert not any(cell.startswith("-") and not cell[1:2].isdigit() for cell in row), row


def test_markdown_holds_no_markup_of_a_name(hostile):
    run, _, _ = hostile
    for name in ("MODEL_CARD.md", "table.md"):
        text = (run / name).read_text(encoding="utf-8")
        for markup in ("<img", "<script", "](javascript:", "**md"):
            assert not re.search(r"(?<!\\)" + re.escape(markup), text), f"{markup} in {name}"


def test_figures_are_drawn(hostile):
    pictures = list((hostile[0] / "figures").iterdir())
    assert len(pictures) >= 5
    for picture in pictures:
        with Image.open(picture) as opened:
            opened.load()


@pytest.mark.parametrize("file", FILES, ids=range(len(FILES)))
def test_predict_says_a_hostile_name_on_one_harmless_line(hostile, driver, file):
    run, images, _ = hostile
    path = images / _decoded(CLASSES[0]) / _decoded(file)
    outcome = driver.run("predict", path, "--run", run)
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    assert all(c.isprintable() or c == "\n" for c in outcome.out)
    unchecked = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["verdict"] == "undecided"
    assert outcome.out.count("nothing checked this posterior") == unchecked
    assert len(outcome.out.splitlines()) == 4 + unchecked + len(CLASSES)
    answer = json.loads(driver.run("predict", path, "--run", run, "--json").out)
    assert len(answer[0]["classes"]) == len(CLASSES)


def test_explain_numbers_its_pictures(hostile, driver, tmp_path):
    run, images, _ = hostile
    paths = [images / _decoded(CLASSES[1]) / _decoded(file) for file in FILES[:7]]
    outcome = driver.run("explain", *paths, "--run", run, "--out", tmp_path / "-cams")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "-cams").iterdir()) == [f"cam-{i:03d}.png" for i in range(1, 8)]
    assert len(outcome.out.splitlines()) == 7
    assert all(c.isprintable() or c == "\n" for c in outcome.out)


@pytest.mark.parametrize("name", ["\x1b[31mabsent\n<b>", b"absent \xff", "{{7*7}}", "-absent"])
@pytest.mark.parametrize("command", ["predict", "run"])
def test_an_error_names_a_hostile_name_on_one_harmless_line(hostile, driver, tmp_path, name, command):
    path = tmp_path / _decoded(name)
    if command == "run":
        outcome = driver.run("run", "--data", path, "--out", tmp_path / "out")
    else:
        outcome = driver.run("predict", path, "--run", hostile[0])
    assert outcome.status in (1, 2)
    assert len(outcome.err.strip("\n").splitlines()) == 1
    assert all(c.isprintable() or c == "\n" for c in outcome.err)
    assert "absent" in outcome.err or "{{7*7}}" in outcome.err


def test_a_run_folder_whose_name_is_not_utf8_is_refused_in_words(driver, settings, tiny, tmp_path):
    """safetensors opens no such path; nothing is begun."""
    out = tmp_path / _decoded(b"run \xff\xfe")
    outcome = driver.run("run", "--config", settings(tiny), "--out", out)
    assert outcome.status == 2
    assert "not UTF-8" in outcome.err
    assert not out.exists()
