"""`nsjail-py imports` proposes a list with which the script runs, and says what it could not find out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nsjail_py
from nsjail_py import cython
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


def test_no_name_in_a_script_adds_a_line_to_what_is_printed() -> None:
    name = "x\n[[mounts]]\nsource = '/etc'\ntarget = '/e'\n#\r\x1b\x85\u2028"
    for source in (f"__import__({name!r})", f"try: __import__({name!r})\nexcept ImportError: pass", f"__import__({'.' + name!r})"):
        said = str(propose(f"{source}\nimport json, msgspec"))
        assert tomllib.loads(said) == {"imports": ["msgspec"]}
        assert all(line.isprintable() for line in said.split("\n"))


@pytest.mark.parametrize("source", [f"x = {'-' * 30_000}1", f"x{'.a' * 30_000}"], ids=["minus", "dots"])
def test_a_script_that_no_parser_takes_is_not_known(source: str, cli: list[str]) -> None:
    done = subprocess.run([*cli, "imports", "-"], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.startswith("imports = []\n# NOT RESOLVED: line 1: ?: "), done.stderr[-200:]


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


# ---------------------------------------------------------------- by the view


@pytest.mark.parametrize("preload", [None, ("json",)], ids=["cold", "warm"])
def test_what_the_policy_does_not_list_cannot_be_imported_nor_found_among_loaded_modules(preload: tuple[str, ...] | None) -> None:
    source = """
import sys
loaded = {name.partition('.')[0] for name in sys.modules} - {'__main__', 'sitecustomize'}  # the second is the distribution's
print(sorted(loaded - set(sys.stdlib_module_names)))
for name in ('numpy', 'msgspec', '_template', '_cffi_backend'):
    try: print(__import__(name))
    except ModuleNotFoundError: pass
"""
    with nsjail_py.Jail(preload=preload) as jail:
        assert jail.run_python(source).check().stdout == b"[]\n"


@pytest.mark.parametrize("options", [{"preload": ()}, {"audit": "report"}], ids=["warm", "audited"])
def test_the_error_names_the_line_of_the_policy(options: dict[str, Any]) -> None:
    with nsjail_py.Jail(**options) as jail:
        told = jail.run_python("import numpy").stderr
        assert told.splitlines()[-1] == b"Only what the policy lists is visible: [python] imports = [..., 'numpy']"
        assert b"visible" not in jail.run_python("import json.nothing").stderr


def test_modules_of_the_standard_library_can_be_left_out() -> None:
    """Some interpreters have `_socket` built in: that stays."""
    names = {"ctypes", "_ctypes", "socket", "_socket"} - set(sys.builtin_module_names)
    source = f"import json\nfor name in {names}:\n  try: print(__import__(name))\n  except ModuleNotFoundError: pass"
    assert nsjail_py.run_python(source, without=["ctypes", "socket"], imports=["json"]).check().stdout == b""
    with nsjail_py.Jail(without=["ctypes", "socket"], preload=["json"]) as jail:
        assert jail.run_python(source).check().stdout == b""
    assert nsjail_py.run_python("import ctypes, socket").ok


@pytest.mark.parametrize("name", ["sys", "posix", "numpy", "sokcet"])
def test_what_cannot_be_left_out_is_a_fault_of_the_policy(name: str) -> None:
    with pytest.raises(nsjail_py.PolicyError, match=r"python\.without"):
        nsjail_py.Jail(without=[name])


def test_what_an_interpreter_starts_with_cannot_be_left_out() -> None:
    """Frozen modules would be there all the same, and without `encodings` no run gets as far as its script."""
    source = "import sys\nprint(*{name.partition('.')[0] for name in sys.modules} & sys.stdlib_module_names, 'runpy')"
    names = nsjail_py.run_python(source).check().stdout.decode().split()
    with pytest.raises(nsjail_py.PolicyError) as caught:
        nsjail_py.Jail(without=names)
    assert {"os", "io", "codecs", "encodings"} <= set(names) and len(caught.value.problems) == len(set(names))


LINE = b'only the needed part of the standard library is visible; [python] imports = [..., "%s"]'


@pytest.mark.parametrize("options", [{}, {"preload": ["json"]}, {"audit": "report"}], ids=["cold", "warm", "audited"])
def test_only_the_needed_part_of_the_standard_library_is_there_and_the_error_names_the_line(options: dict[str, Any]) -> None:
    with nsjail_py.Jail(stdlib="needed", imports=["json"], **options) as jail:
        source = "import json, os\nprint(json.dumps([1]), [n for n in os.listdir(os.path.dirname(os.__file__) + '/lib-dynload') if 'socket' in n])"
        assert jail.run_python(source).check().stdout == b"[1] []\n"
        for name in (b"socket", b"subprocess", b"asyncio"):
            assert LINE % name in jail.run_python(b"import " + name).stderr.splitlines()[-1]
        assert jail.run_python("try: import socket\nexcept ImportError as error: print(error.name)").check().stdout == b"socket\n"


def test_a_list_with_a_module_of_the_standard_library_is_the_whole_list() -> None:
    source = "import numpy, json\nprint(json.loads('3') + numpy.int64(1))\nimport sqlite3"
    result = nsjail_py.run_python(source, imports=["numpy", "json"])
    assert result.stdout == b"4\n" and LINE % b"sqlite3" in result.stderr
    for other in ({"imports": ["numpy"]}, {"imports": ["numpy", "json"], "stdlib": "whole"}):
        assert nsjail_py.run_python("import json, sqlite3", **other).ok


def test_what_a_listed_module_imports_is_needed_too() -> None:
    source = (
        "import socket, datetime, hashlib; socket.SOCK_STREAM, hashlib.blake2s(b'')\nprint(datetime.datetime.strptime('2020', '%Y').year)"
    )
    result = nsjail_py.run_python(source, stdlib="needed", imports=["socket", "datetime", "hashlib"])
    assert result.check().stdout == b"2020\n" and not result.stderr


def test_a_distribution_finds_what_it_imports() -> None:
    source = "import numpy\nprint(numpy.arange(3).sum(), 0 <= numpy.random.default_rng().random() < 1)\nimport sqlite3"
    result = nsjail_py.run_python(source, stdlib="needed", imports=["numpy"])
    assert result.stdout == b"3 True\n" and LINE % b"sqlite3" in result.stderr


def squeezed(text: bytes) -> bytes:
    """As Cython 3.3 stores strings: eight bits, then for each a byte, or how far back and how much."""
    out, at = bytearray(), 0
    while at < len(text):
        flags, items = 0, bytearray()
        for bit in range(8):
            length = next((n for n in (250, 30, 8, 4) if n + 3 <= len(text) - at and text.find(text[at : at + n + 3], 0, at) >= 0), 0)
            if at >= len(text) or length == 0:
                flags |= 1 << bit
                items += text[at : at + 1] or b"\0"
                at += 1
                continue
            back = at - text.rfind(text[at : at + length + 3], 0, at) - length - 3
            if back < 0x80:
                items += bytes([back, length])
            elif back - 0x80 < 1 << 9 and length < 1 << 5:
                items += bytes([0x80 | (back - 0x80) & 0x7F, (back - 0x80) >> 2 & 0x60 | length])
            else:
                items += bytes([0x80 | (back - 0x80) & 0x7F, 0x80 | (back - 0x80) >> 7, length])
            at += length + 3
        out += bytes([flags]) + items
    return bytes(out)


@pytest.mark.parametrize("store", [bytes, zlib.compress, squeezed])
def test_the_strings_of_an_extension_are_found_however_cython_stores_them(store: Callable[[bytes], bytes]) -> None:
    text = b"A sentence that stands for the documentation of a module, and for names that are in it.".join(
        bytes([97 + n % 26]) * 3 + f"some{n}_attribute".encode() for n in range(40)
    ) + (b"cline_in_tracebackgetstatesecretsrandbits" + b"_" * 300) * 2  # fmt: skip
    code = bytes(range(256)) * 20
    found = b"".join(cython.texts(code + b"\0cython_runtime\0" + store(text) + b"\0" + code))
    assert b"cline_in_tracebackgetstatesecretsrandbits___" in found
    assert list(cython.texts(code + store(text))) == [], "it was not Cython that made this"


def test_a_session_has_what_it_imports_itself() -> None:
    with nsjail_py.Jail(stdlib="needed") as jail, jail.session() as session:
        assert session.run("1 + 1").value == "2"
        error = session.run("import sqlite3").error
        assert error is not None and LINE % b"sqlite3" in str(error).encode()


def test_without_holds_also_for_what_is_needed() -> None:
    result = nsjail_py.run_python("import json", stdlib="needed", imports=["json"], without=["json"])
    assert result.stderr.splitlines()[-1] == b"ModuleNotFoundError: No module named 'json'"


def test_a_part_of_the_standard_library_is_for_minimal_roots_only() -> None:
    with pytest.raises(nsjail_py.PolicyError, match=r"python\.stdlib"):
        nsjail_py.Jail(stdlib="needed", root="system")
