"""The run folder keeps its promises: one owner, whole stages, nothing overwritten unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bayescam.errors import BayescamError, UsageError
from bayescam.runfolder import AlreadyComplete, opened, verified
from bayescam.storage import atomic_path, inert, printable, sha256_of, write_csv, write_text


def _open(path, overrides=None, *, resume=False, overwrite=False):
    return opened(path, None, overrides or {}, resume=resume, overwrite=overwrite)


def _stage(folder, name, text="x"):
    with folder.stage(name, [f"{name}.txt"]):
        write_text(folder / f"{name}.txt", text)


def test_an_empty_folder_is_fine_and_a_full_one_is_not(tmp_path):
    (tmp_path / "out").mkdir()
    with _open(tmp_path / "out") as (folder, _):
        _stage(folder, "a")
    with pytest.raises(UsageError, match=r"not empty.*--resume or --overwrite"), _open(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"), _open(tmp_path / "file"):
        pass


def test_overwrite_never_clears_a_folder_that_is_not_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not a run"), _open(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_keeps_its_hands_off_a_project_that_has_a_config_toml(tmp_path):
    """Neither another program's folder nor a run that the user has put something into is emptied."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/config.toml").write_text('preset = "quick"\n')
    (tmp_path / "site/post.md").write_text("mine")
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(UsageError, match="not a run"), _open(tmp_path / "site", **options):
            pass
    (tmp_path / "jobs").mkdir()
    for name, content in (("config.toml", 'title = "nightly"'), ("run.json", '{"jobs": []}')):
        (tmp_path / "jobs" / name).write_text(content)
    with pytest.raises(UsageError, match=r"not that of a run .*title"), _open(tmp_path / "jobs", overwrite=True):
        pass
    assert (tmp_path / "jobs/run.json").read_text() == '{"jobs": []}'
    with _open(tmp_path / "r") as (folder, _):
        write_text(folder / "metrics.json", "{}")
    (tmp_path / "r/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.tex, which"), _open(tmp_path / "r", overwrite=True):
        pass
    assert (tmp_path / "r/thesis.tex").read_text() == "years of work"
    (tmp_path / "r/thesis.tex").unlink()
    with _open(tmp_path / "r", overwrite=True):
        assert not (tmp_path / "r/metrics.json").exists()


def test_a_run_inside_its_data_or_inside_another_run_is_refused(tmp_path):
    """Figures in a class folder would be images of that class when the run is resumed."""
    (tmp_path / "images/hand").mkdir(parents=True)
    spec = {"data.spec": str(tmp_path / "images")}
    for out in ("images/runs/1", "images/hand", "images/../images/hand/new"):
        with pytest.raises(UsageError, match=r"lies among the images of --data .*outside"), _open(tmp_path / out, spec):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "hand"]
    with _open(tmp_path / "r", spec) as (folder, _):
        _stage(folder, "a")
    with pytest.raises(UsageError, match="lies in the run folder"), _open(tmp_path / "r/inner"):
        pass
    (tmp_path / "images/manifest.csv").write_text("path,label\n")
    with _open(tmp_path / "images/runs/1", spec):
        pass


def test_a_run_that_finished_nothing_may_be_begun_with_other_settings(tmp_path):
    with pytest.raises(OSError, match="absent"), _open(tmp_path / "r", {"seed": 1}):
        raise OSError("absent")
    with _open(tmp_path / "r", {"seed": 2}) as (folder, config):
        assert config.seed == 2
        _stage(folder, "a")
    with pytest.raises(UsageError, match="not empty"), _open(tmp_path / "r", {"seed": 3}):
        pass


def test_resume_keeps_whole_stages_and_overwrite_drops_them(tmp_path):
    with _open(tmp_path / "r") as (folder, _):
        _stage(folder, "a")
    with _open(tmp_path / "r", resume=True) as (folder, _):
        assert folder.done("a")
        assert not folder.done("b")
        (folder / "a.txt").unlink()
        assert not folder.done("a")
        with folder.stage("b", ["metrics.json"]):
            write_text(folder / "metrics.json", "{}")
    with _open(tmp_path / "r", overwrite=True) as (folder, _):
        assert not folder.done("b")


def test_what_a_kill_leaves_behind_is_no_obstacle_and_is_swept(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.abc.partial.toml").write_text("half")
    with _open(tmp_path / "r", resume=True) as (folder, _):
        _stage(folder, "a")
        (tmp_path / "r/figures").mkdir()
        (tmp_path / "r/figures/.x_1.partial.png").write_text("half")
        (tmp_path / "r/.mine").write_text("not ours")
    with _open(tmp_path / "r", resume=True) as (folder, _):
        folder.scratch.mkdir()
        (folder.scratch / "epoch").write_text("")
        folder.complete({})
    assert not list((tmp_path / "r").rglob("*.partial*"))
    assert not (tmp_path / "r/.scratch").exists()
    assert (tmp_path / "r/.mine").is_file()


def test_an_overwriting_that_is_killed_leaves_an_unfinished_run(tmp_path, monkeypatch):
    with _open(tmp_path / "r") as (folder, _):
        write_text(folder / "metrics.json", "{}")
        folder.complete({})
    removed = []
    unlink = Path.unlink

    def killed(path, **options):
        removed.append(path.name)
        if len(removed) == 2:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt), _open(tmp_path / "r", overwrite=True):
            pass
    assert removed[0] == "run.json"
    with _open(tmp_path / "r", overwrite=True) as (folder, _):
        assert not (folder / "metrics.json").exists()


def test_the_record_of_a_run_does_not_list_itself(tmp_path):
    with _open(tmp_path / "r") as (folder, _):
        _stage(folder, "a")
        folder.complete({})
        folder.complete({})
    assert set(json.loads((tmp_path / "r/run.json").read_text())["files"]) == {"a.txt", "config.toml"}


@pytest.mark.parametrize("content", ["[]", "{", "[" * 20_000, '{"files": 3}', '{"files": {"a.txt": null}}', "\ud800"])
def test_a_broken_record_is_refused(tmp_path, content):
    with _open(tmp_path / "r") as (folder, _):
        _stage(folder, "a")
        folder.complete({})
    (tmp_path / "r/run.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(BayescamError, match=r"run\.json|a\.txt"):
        verified(tmp_path / "r", "a.txt")
    (tmp_path / "r/run.json").unlink()
    (tmp_path / "r/.stages.json").write_text('{"a": {"seconds": 1, "files": []}}')
    with pytest.raises(BayescamError, match=r"stages\.json.*'a' is broken"), _open(tmp_path / "r", resume=True):
        pass


def test_a_file_changed_by_hand_is_noticed(tmp_path):
    with _open(tmp_path / "r") as (folder, _):
        _stage(folder, "a")
        write_text(folder / "a.txt", "other")
        with pytest.raises(BayescamError, match="changed since the run wrote it"):
            folder.done("a")


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 5}, "seed"), ({"data.spec": "mednist"}, "data.spec"), ({"preset": "quick"}, "preset")],
)
def test_resume_with_another_setting_names_it(tmp_path, change, name):
    with _open(tmp_path / "r", {"seed": 4}) as (folder, config):
        assert config.seed == 4
        _stage(folder, "a")
    with pytest.raises(UsageError, match=name.replace(".", r"\.")), _open(tmp_path / "r", change, resume=True):
        pass
    with _open(tmp_path / "r", resume=True) as (_, config):
        assert config.seed == 4


def test_resume_on_a_missing_folder_starts_and_on_a_complete_one_says_so(tmp_path):
    with _open(tmp_path / "r", resume=True) as (folder, _):
        _stage(folder, "a")
        folder.complete({"seed": 0})
    with pytest.raises(AlreadyComplete), _open(tmp_path / "r", resume=True):
        pass
    stored = json.loads((tmp_path / "r/run.json").read_text())
    assert stored["status"] == "complete"
    assert stored["files"]["a.txt"]["sha256"] == sha256_of(tmp_path / "r/a.txt")
    assert verified(tmp_path / "r", "a.txt") == tmp_path / "r"
    write_text(tmp_path / "r/a.txt", "other")
    with pytest.raises(BayescamError, match=r"a\.txt: changed since"):
        verified(tmp_path / "r", "a.txt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: write_text(run / "a.txt", "other"), r"a\.txt: changed since .* run again"),
        (lambda run: (run / "a.txt").unlink(), r"a\.txt: missing"),
        (lambda run: write_text(run / "report.html", "other"), r"report\.html: changed since .*bayescam report"),
        (lambda run: (run / "figures/a.png").unlink(), r"figures/a\.png: missing; bayescam report"),
        (lambda run: write_text(run / "run.json", '{"status": "complete", "files": {}}'), r"run\.json: lists no files"),
        (lambda run: write_text(run / "run.json", '{"files": {"config.toml": {}}}'), r"config\.toml: changed"),
    ],
)
def test_resume_says_complete_only_of_a_run_that_is_as_it_was_written(tmp_path, change, words):
    with _open(tmp_path / "r") as (folder, _):
        _stage(folder, "a")
        write_text(folder / "report.html", "<p>")
        (folder / "figures").mkdir()
        write_text(folder / "figures/a.png", "a")
        folder.complete({})
    with pytest.raises(AlreadyComplete), _open(tmp_path / "r", resume=True):
        pass
    change(tmp_path / "r")
    with pytest.raises(BayescamError, match=words), _open(tmp_path / "r", resume=True):
        pass


def test_an_unfinished_or_foreign_folder_is_not_a_run(tmp_path):
    with pytest.raises(BayescamError, match="is not a run folder"):
        verified(tmp_path)
    with _open(tmp_path / "r"):
        pass
    with pytest.raises(BayescamError, match="is not finished"):
        verified(tmp_path / "r")


def test_the_second_process_is_refused_and_the_lock_dies_with_the_first(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time, pathlib
        from bayescam.runfolder import opened
        with opened(pathlib.Path(sys.argv[1]), None, {}, resume=False, overwrite=False):
            print("in", flush=True)
            time.sleep(60)
        """
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "in"
        with pytest.raises(BayescamError, match="another run is working"), _open(tmp_path / "r", resume=True):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with _open(tmp_path / "r", resume=True):
        pass


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BayescamError, match="cannot be written"), _open(tmp_path / "r"):
        pass


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "f.txt"
    write_text(file, "old")

    def torn_write():
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        torn_write()
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_tables_are_inert_and_names_are_one_line(tmp_path):
    write_csv(tmp_path / "t.csv", ("a",), [("=cmd()",), ("-x",), ("plain",), (-1.5,)])
    assert (tmp_path / "t.csv").read_text() == "a\n'=cmd()\n'-x\nplain\n-1.5\n"
    assert inert("@x") == "'@x"
    assert printable("a\nb\x1b[31m\udcff") == "a\\nb\\x1b[31m\\udcff"


def test_a_long_name_is_cut_to_the_limit_and_stays_unlike_any_other():
    names = [f"{'x' * 150}{middle}{'y' * 150}" for middle in ("", "a", "b", "a\n", "\udcff")]
    for limit in (20, 200):
        cut = [printable(name, limit) for name in names]
        assert all(len(text) == limit and text.isprintable() for text in cut)
        assert len(set(cut)) == len(names)
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 150 + "y" * 150).startswith("x" * 95 + "…")
    assert printable("x" * 150 + "y" * 150).endswith("…" + "y" * 95)
