"""The command line: light help, one-line errors with the next step, exit statuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from bayescam.cli import main


def test_help_of_every_command_needs_no_heavy_import():
    script = (
        "import sys, contextlib, io\n"
        "from bayescam.cli import main, _parser\n"
        "commands = [a for a in _parser()._actions if hasattr(a, 'choices') and a.choices][-1].choices\n"
        "for name in commands:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main([name, '--help'])\n"
        "    assert 'usage: bayescam ' + name in out.getvalue(), name\n"
        "heavy = {'torch', 'pyro', 'arviz', 'matplotlib', 'xarray', 'torchvision', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(sorted(commands))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name in ("run", "predict", "explain", "posterior", "diagnose", "data", "report", "doctor"):
        assert f"'{name}'" in done.stdout


def _lines(capsys) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run", "--data", "{tmp}/absent", "--out", "{tmp}/o"], 1, "absent"),
        (["run", "--data", "{tmp}/empty", "--out", "{tmp}/o"], 1, "empty"),
        (["run", "--out", "{tmp}/full"], 2, "not empty"),
        (["run", "--out", "{tmp}/file"], 2, "is a file"),
        (["run", "--config", "{tmp}/absent.toml", "--out", "{tmp}/o"], 2, "no such file"),
        (["run", "--config", "{tmp}/wrong.toml", "--out", "{tmp}/o"], 2, "train.epochs must be a whole number"),
        (["run", "--seed", "-1", "--out", "{tmp}/o"], 2, "seed must be at least 0"),
        (["run", "--backbone", "resnet19", "--limit", "100", "--out", "{tmp}/o"], 2, "resnet19"),
        (["run", "--device", "cuda:99", "--out", "{tmp}/o"], 2, "--device cuda:99"),
        (["run", "--data", "{tmp}/absent", "--out", "{tmp}/begun"], 1, "absent"),
        (["explain", "x.png", "--run", "{tmp}/empty", "--out", "{tmp}/file"], 1, "is not a run folder"),
        (["run", "--resume"], 2, "--resume needs --out"),
        (["run", "--resume", "--overwrite", "--out", "{tmp}/o"], 2, "exclude each other"),
        (["predict", "x.png", "--run", "{tmp}/empty"], 1, "is not a run folder"),
        (["explain", "x.png", "--run", "{tmp}/empty", "--out", "{tmp}/o"], 1, "is not a run folder"),
        (["data", "phantom", "--num", "100000000000", "--out", "{tmp}/o"], 2, "give a whole number from 1"),
        (["data", "phantom", "--seed", "-1", "--out", "{tmp}/o"], 2, "--seed -1: give a whole number"),
        (["data", "check", "{tmp}/empty", "--num-workers", "-1"], 2, "--num-workers -1"),
        (["report", "{tmp}/empty"], 1, "is not a run folder"),
        (["diagnose", "{tmp}/empty"], 1, "empty"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, arguments, status, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.toml").write_text('preset = "quick"')  # of a run that got no further
    (tmp_path / "begun/.lock").write_text("")
    (tmp_path / "wrong.toml").write_text('[train]\nepochs = "many"\n')
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == status
    lines = _lines(capsys)
    assert len(lines) == 1, lines
    assert lines[0].startswith("bayescam: ")
    assert words in lines[0]
    assert (tmp_path / "full/thing.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/r/cams.nc"), "/r/cams.nc: No space left on device; make"),
        (PermissionError(errno.EACCES, "Permission denied", "/r"), "/r: Permission denied; get the right to it"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; name another place"),
        (OSError("plain words"), "plain words"),
        (MemoryError("Unable to allocate 7 TiB"), "not enough memory (Unable to allocate 7 TiB); free some, or"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_the_next_step(monkeypatch, capsys, tmp_path, error, words):
    def fails(path):
        raise error

    monkeypatch.setattr("bayescam.diagnose.diagnosis.diagnose_run", fails)
    assert main(["diagnose", str(tmp_path)]) == 1
    lines = _lines(capsys)
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("interrupt", "words"),
    [
        (KeyboardInterrupt(), "bayescam: interrupted; what was finished is kept (see --resume)"),
        (KeyboardInterrupt("1 of 4 chains complete"), "bayescam: 1 of 4 chains complete; what was finished is kept"),
    ],
)
def test_an_interrupt_is_one_line_and_status_130(monkeypatch, capsys, tmp_path, interrupt, words):
    def pressed(path):
        raise interrupt

    monkeypatch.setattr("bayescam.diagnose.diagnosis.diagnose_run", pressed)
    assert main(["diagnose", str(tmp_path)]) == 130
    (line,) = _lines(capsys)
    assert line.startswith(words)


def test_an_error_in_the_program_itself_keeps_its_traceback(monkeypatch, tmp_path):
    def fails(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr("bayescam.diagnose.diagnosis.diagnose_run", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["diagnose", str(tmp_path)])


@pytest.mark.skipif(os.name != "posix", reason="POSIX folders")
def test_a_working_directory_that_is_gone_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (["run"], ["data", "list"], ["posterior", "--features", "f.npz", "--out", "o"]):
        assert main(command) == 2
        assert _lines(capsys) == [
            "bayescam: the working directory is gone (No such file or directory); cd to another one"
        ]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("{bayescam} data list | true; exit 0", 0, ""),
        ("{bayescam} data list >&-", 0, ""),
        ("{bayescam} data list 2>&-", 0, ""),
        ("{bayescam} posterior --features absent --out o 2>&- >&-", 1, ""),
        ("{bayescam} data list > /dev/full", 1, "bayescam: No space left on device; make room"),
        (
            "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {bayescam} posterior --features caf\u00e9 --out o",
            1,
            "no such file",
        ),
        ("COLUMNS=0 TERM=dumb {bayescam} posterior --features absent --out o <&-", 1, "absent: no such file"),
    ],
)
def test_pipes_that_close_full_disks_and_plain_terminals(tmp_path, shell, status, said):
    command = shell.format(bayescam=f"{sys.executable} -m bayescam")
    environment = os.environ | {"BAYESCAM_CACHE": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, cwd=tmp_path, env=environment, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    main([])
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    os.environ.pop("GOMP_SPINCOUNT", None)


def test_unknown_flags_and_no_command_are_wrong_usage(capsys):
    assert main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--no-such-flag"])
    assert stopped.value.code == 2
    capsys.readouterr()


def test_doctor_says_what_it_finds(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch with torchvision: fit together" in printed
    assert "cache folder" in printed


def test_doctor_names_a_torchvision_of_another_build(monkeypatch):
    from bayescam import doctor

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", broken)
    check = doctor._torch_pair()
    assert not check.passed
    assert "different builds" in check.words
    assert "pip install" in check.words


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["--debug", "report", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
