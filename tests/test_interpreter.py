"""An interpreter is described as it will run inside; what is none is refused in one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nsjail_py import interpreter
from nsjail_py.errors import PolicyError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A virtual environment's interpreter."""
    venv.create(tmp_path / "env", with_pip=False)
    return str(tmp_path / "env/bin/python")


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_running_interpreter_is_described_without_a_process(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    found = interpreter.inspect()
    assert found.executable == os.path.realpath(sys._base_executable)
    assert found.version == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert found.prefix == sys.base_prefix
    assert sysconfig.get_path("stdlib") in found.stdlib
    assert any(os.path.isfile(f"{folder}/os.py") for folder in found.stdlib)
    assert sysconfig.get_path("purelib") in found.search


def test_a_virtual_environment_runs_its_base_and_finds_its_own_distributions(other, tmp_path):
    found = interpreter.inspect(other)
    assert found.executable == interpreter.inspect().executable
    assert not found.site.startswith(str(tmp_path))
    assert found.search[0].startswith(str(tmp_path / "env"))


def test_another_interpreter_is_run_only_once(other, monkeypatch):
    first = interpreter.inspect(other)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was run again"))
    assert interpreter.inspect(other) == first


def test_a_changed_virtual_environment_is_asked_again(other, tmp_path):
    interpreter.inspect(other)
    config = tmp_path / "env/pyvenv.cfg"
    config.write_text(config.read_text().replace("include-system-site-packages = false", "include-system-site-packages = true "))
    assert len(interpreter.inspect(other).search) > 1


def test_another_interpreter_is_asked_again_when_its_search_path_changes(other, tmp_path):
    (site,) = interpreter.inspect(other).search
    for name in ("first", "second"):
        place = tmp_path / name / "site-packages"
        place.mkdir(parents=True)
        Path(site, "more.pth").write_text(f"{place}\n")  # the second time the file is written over, and its directory stays as it was
        assert interpreter.inspect(other).search == (site, str(place))


def test_a_damaged_answer_in_the_cache_is_asked_for_again(other, tmp_path):
    first = interpreter.inspect(other)
    for kept in (tmp_path / "cache/interpreters").iterdir():
        kept.write_text("{")
    assert interpreter.inspect(other) == first


def test_the_environment_of_the_caller_does_not_reach_it(other, monkeypatch, tmp_path):
    first = interpreter.inspect(other)
    (tmp_path / "json.py").write_text("raise SystemExit('misled')")
    for path in (tmp_path / "cache/interpreters").iterdir():
        path.unlink()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert interpreter.inspect(other) == first


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda top: str(top / "nowhere"), "No such file"),
        (lambda top: str(top), "not a program that can be executed"),
        (lambda top: script(top / "shim", "#!/bin/sh\nexec python3\n"), "a script"),
        (lambda _: os.path.realpath("/bin/true"), "does not work as a Python interpreter"),
        (lambda _: "/etc/passwd", "not a program that can be executed"),
        (lambda _: "a\0b", "null"),
    ],
)
def test_what_is_no_interpreter_is_refused_in_one_line(tmp_path, make, says):
    with pytest.raises(PolicyError, match=says) as caught:
        interpreter.inspect(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_interpreter_that_is_too_old_says_so(other, monkeypatch):
    monkeypatch.setattr(interpreter, "OLDEST", (99, 0))
    with pytest.raises(PolicyError, match=r"too old; 99\.0 or later"):
        interpreter.inspect(other)


def test_an_interpreter_that_never_answers_is_given_up(other, monkeypatch):
    monkeypatch.setattr(interpreter, "TIMEOUT", 0.001)
    with pytest.raises(PolicyError, match="gave no answer"):
        interpreter.inspect(other)


def test_an_interpreter_without_its_library_says_so():
    answer = interpreter.facts() | {"stdlib": ["/nowhere/lib/python3.11"]}
    with pytest.raises(PolicyError, match="no standard library at /nowhere"):
        interpreter._convert("python", answer)
