"""`nsjail-py imports` proposes a list with which the script runs, and says what it could not find out."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

import nsjail_py
from nsjail_py.layers.imports import propose


def test_it_separates_installed_standard_and_unknown() -> None:
    found = propose("import json, numpy.linalg, no_such_thing\nfrom os import path\nimport dateutil.parser")
    assert found.imports == ["numpy", "python-dateutil"]
    assert found.standard == ["json", "os"]
    assert [(one.line, one.module) for one in found.unresolved] == [(1, "no_such_thing")]


def test_it_says_what_a_text_cannot_tell() -> None:
    found = propose("import importlib\nimportlib.import_module('num' 'py')\n__import__(input())\n")
    assert found.imports == ["numpy"]
    assert [(one.line, one.module) for one in found.unresolved] == [(3, "?")]


def test_an_import_that_the_script_can_do_without_is_no_fault() -> None:
    found = propose("try:\n    import no_such_thing\nexcept ImportError:\n    no_such_thing = None")
    assert found.optional == ["no_such_thing"] and not found.unresolved


def test_what_a_minimal_root_leaves_out_is_told() -> None:
    assert "minimal root" in propose("import tkinter").unresolved[0].reason


def test_an_editable_install_cannot_be_listed() -> None:
    assert "editable" in propose("import nsjail_py").unresolved[0].reason


def test_modules_beside_the_script_are_local(tmp_path: Path) -> None:
    (tmp_path / "helper.py").touch()
    assert propose("import helper\nfrom . import x", project=[str(tmp_path)]).local == [".", "helper"]


def test_a_syntax_error_is_one() -> None:
    with pytest.raises(SyntaxError):
        propose("x = (")


def test_the_script_runs_with_the_line_that_is_printed(cli: list[str], tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import json, msgspec\nprint(msgspec.json.encode([1]))")
    done = subprocess.run([*cli, "imports", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = tomllib.loads(done.stdout)["imports"]
    assert listed == ["msgspec"]
    assert nsjail_py.run_python(script.read_bytes(), imports=tuple(listed)).stdout == b"b'[1]'\n"
