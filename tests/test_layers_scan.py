"""The scan sees what Python will execute, says it with its place, and never takes the place of the jail."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nsjail_py
from nsjail_py.layers.rules import RULES, SEVERITIES
from nsjail_py.layers.scan import ScanWarning, scan

Cli = list[str]

SEEN = {
    "an import": (b"import ctypes", "memory", 1, 1),
    "from": (b"x = 1\nfrom os import system", "command", 2, 1),
    "a module below": (b"import importlib.util", "import-machinery", 1, 1),
    "utf-7": (b"# coding: utf-7\n+AGkAbQBwAG8AcgB0- ctypes", "memory", 2, 1),
    "a line inside a comment": (b"# coding: unicode_escape\n# \\nimport ctypes", "memory", 3, 1),
    "a BOM": (b"\xef\xbb\xbfimport ctypes", "memory", 1, 1),
    "a bare carriage return": (b"#\rimport ctypes", "memory", 2, 1),
    "NFKC": ("x = \uff45\uff56\uff41\uff4c".encode(), "code", 1, 5),
    "NFKC in an attribute": ("é = 'é'; x.__\uff43lass__".encode(), "dunder", 1, 12),
    "an f-string": (b"print(f'{x.__class__}')", "dunder", 1, None),
    "a nested f-string": (b"f'{1:{eval}}'", "code", 1, None),
    "an annotation": (b"def f(x: eval('1')): pass", "code", 1, 10),
    "an annotation that is a string": (b"x: 'a.__class__'", "dunder", 1, 4),
    "a returned type that is a string": (b"def f() -> 'exec(1)': pass", "code", 1, 12),
    "a decorator": (b"@exec\nclass A: pass", "code", 1, 2),
    "a pattern": (b"match x:\n    case object(__class__=c): pass", "dunder", 2, 10),
    "except*": (b"try: pass\nexcept* ValueError as e: e.__traceback__", "dunder", 2, 28),
    "a sum of strings": (b"getattr(x, '__cl' + 'ass__')", "dunder", 1, 12),
    "neighbouring strings": (b"__import__('cty' 'pes')", "memory", 1, 1),
    "a template": (b"'{0.__class__}'.format(x)", "dunder", 1, 1),
    "an escape": (b"__import__('\\x63types')", "memory", 1, 1),
    "a metaclass": (b"class A(metaclass=M): pass", "special-method", 1, 1),
    "a method": (b"class A:\n  def __reduce__(self): pass", "pickle", 2, 3),
    "a type parameter's default": (b"x = lambda y=eval: y", "code", 1, 14),
    "NUL": (b"x = 1\n#\0\n", "unreadable", 2, 1),
    "NUL by an escape": (b"# coding: unicode_escape\n# \\0\n", "unreadable", 1, 1),
    "a deep nest": (b"x = " + b"-" * 100_000 + b"1", "unreadable", 1, 1),
    "a carriage return that was encoded": (b"# coding: utf-7\n#+AA0-import ctypes", "memory", 3, 1),
    "a carriage return that was escaped": (b"# coding: unicode_escape\n#\\rimport ctypes", "memory", 3, 1),
    "direction of writing": ("x = 'a\u202eb'".encode(), "direction", 1, 7),
}


@pytest.mark.parametrize("name", SEEN)
def test_it_sees_what_is_executed(name: str) -> None:
    source, rule, line, column = SEEN[name]
    found = {one.rule: one for one in reversed(scan(source))}
    assert rule in found, found
    assert found[rule].line == line
    assert column is None or found[rule].column == column


def test_every_rule_has_a_severity_a_sentence_and_an_advice() -> None:
    for rule in RULES:
        assert rule.severity in SEVERITIES and rule.sentence.endswith(".") and rule.advice.endswith("."), rule.name
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_an_ordinary_program_has_no_findings() -> None:
    source = """
import json, math, re, random, datetime, collections, itertools, functools, dataclasses, typing, enum
@dataclasses.dataclass
class Point:
    x: float
    y: "float" = 0.0
    def __post_init__(self): self.norm = math.hypot(self.x, self.y)
    def __repr__(self): return f"<{self.x}, {self.y}>"
    def __eq__(self, other): return isinstance(other, Point) and self.x == other.x
class Sub(Point):
    def __init__(self): super().__init__(1, 2)
print("the system is open; fork, import and modules are words: {} {0}".format(json.dumps({"a": 1})))
if __name__ == "__main__":
    match Point(1, 2):
        case Point(x=1, y=y): print(y)
"""
    assert scan(source) == ()


BROKEN = [
    b"x = (1,",
    b"# coding: nonsense\n",
    b"\xff",
    b"# coding: ascii\n\xc3\xa4",
    b"if 1:\nx",
    b"# coding: idna\n\xff",
    b"# coding: hex\n41",
]


@pytest.mark.parametrize("source", BROKEN)
def test_what_is_no_python_is_a_syntax_error_and_no_finding(source: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.py").write_bytes(source)
    said = subprocess.run([sys.executable, tmp_path / "s.py"], capture_output=True, text=True, check=False).stderr
    with pytest.raises(SyntaxError) as error:
        scan(source)
    assert said.splitlines()[-1].startswith(f"{type(error.value).__name__}: ")


@given(st.binary(max_size=200) | st.text(alphabet="#\r\n()[]{}:=. \\'\"fxif1@*\0\ufeff\u202e", max_size=60).map(lambda t: t.encode()))
def test_any_bytes_are_findings_or_a_syntax_error(source: bytes) -> None:
    with contextlib.suppress(SyntaxError):
        scan(source)


@pytest.mark.parametrize(
    "name", ["a carriage return that was encoded", "a carriage return that was escaped", "a line inside a comment", "utf-7"]
)
def test_what_it_sees_is_what_a_jail_executes(name: str) -> None:
    """compile() takes some of these otherwise than Python takes a script."""
    source = SEEN[name][0].replace(b"import ctypes", b"print(1)").replace(b"+AGkAbQBwAG8AcgB0- ctypes", b"+AHAAcgBpAG4AdA-(1)")
    assert nsjail_py.run_python(source).stdout == b"1\n"
    with pytest.raises(nsjail_py.ScriptRefused):
        nsjail_py.run_python(SEEN[name][0], scan="refuse", scan_ignore=("encoding", "hidden-line"))


@pytest.mark.parametrize("preload", [None, []], ids=["cold", "warm"])
@pytest.mark.parametrize("source", [b"# coding: utf-8\n# \xff\nprint(1)", b"# \xff coding: latin-1\nprint(1)"])
def test_bytes_that_only_the_interpreter_passes_over_are_refused(source: bytes, preload: list[str] | None) -> None:
    """Not all of a comment's bytes need to be of the declared encoding, until the interpreter's later versions."""
    with nsjail_py.Jail("untrusted", preload=preload) as jail:
        taken = jail.run_python(source)
    assert taken.stdout == b"1\n" or b"SyntaxError" in taken.stderr
    if taken.ok:
        with nsjail_py.Jail("untrusted", preload=preload, scan="refuse") as jail, pytest.raises(nsjail_py.ScriptRefused, match="encoding"):
            jail.run_python(source)


def test_each_cell_of_a_session_is_scanned_and_a_refused_one_costs_no_state() -> None:
    with nsjail_py.Jail("untrusted", preload=[], scan="refuse") as jail, jail.session() as session:
        session.run("x = 1").check()
        with pytest.raises(nsjail_py.ScriptRefused, match="<cell 2>"):
            session.run("x = 2; import ctypes")
        assert session.run("x").value == "1"


def test_an_executor_whose_functions_could_not_be_scanned_is_refused() -> None:
    with pytest.raises(nsjail_py.PolicyError, match=r"\$\.python\.scan"):
        nsjail_py.JailExecutor("untrusted", scan="refuse")


def test_what_only_a_warm_interpreter_would_take_is_seen() -> None:
    """For a script it is a syntax error; compile() sees a comment, and an import."""
    source = b"# coding: utf-7\n#+AA0-)(\nimport ctypes"
    try:
        compile(source, "x", "exec")
    except SyntaxError:
        return  # since 3.12
    assert [one.rule for one in scan(source)] == ["encoding", "hidden-line", "memory"]
    with nsjail_py.Jail("untrusted", preload=[], scan="refuse") as jail, pytest.raises(nsjail_py.ScriptRefused):
        jail.run_python(source)


def test_the_command_says_a_syntax_error_as_python_does(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("x = (1,\n")
    ours = subprocess.run([*cli, "scan", "s.py"], cwd=tmp_path, capture_output=True, check=False)
    python = subprocess.run(
        [sys.executable, "-c", "compile(open('s.py').read(), 's.py', 'exec')"], cwd=tmp_path, capture_output=True, check=False
    )
    assert ours.returncode == 2 and ours.stdout == b""
    assert python.stderr.endswith(ours.stderr)


def test_the_command_prints_findings_and_json(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import ctypes\nprint(1)\n")
    done = subprocess.run([*cli, "scan", tmp_path / "s.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.startswith("s.py:1:1: high: import of ctypes: ") and done.stdout.count("\n") == 1
    done = subprocess.run([*cli, "scan", "--json", tmp_path / "s.py"], capture_output=True, text=True, check=False)
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["rule"], finding["line"], finding["column"], finding["severity"]) == ("memory", 1, 1, "high")
    done = subprocess.run([*cli, "scan", "--ignore", "memory", tmp_path / "s.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ---------------------------------------------------------------- under a policy


def test_a_policy_does_not_scan_unless_it_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nsjail_py.run_python("import os; print(1)").stdout == b"1\n"


def test_refuse_starts_nothing_and_says_why() -> None:
    with pytest.raises(nsjail_py.ScriptRefused, match=r"main.py:1:1: medium: import of os: .*\[files\]") as refused:
        nsjail_py.run_python("import os; print(1)", scan="refuse")
    assert refused.value.findings[0].rule == "files"
    assert nsjail_py.run_python("print(1)", scan="refuse").stdout == b"1\n"
    assert nsjail_py.run_python("import os; print(1)", scan="refuse", scan_ignore=("files",)).stdout == b"1\n"


def test_refuse_holds_for_asyncio_and_for_a_warm_interpreter() -> None:
    import asyncio

    from nsjail_py import aio

    with pytest.raises(nsjail_py.ScriptRefused):
        asyncio.run(aio.run_python("import os", scan="refuse"))
    with nsjail_py.Jail("untrusted", preload=[], scan="refuse") as jail:
        assert jail.run_python("print(1)").stdout == b"1\n"
        with pytest.raises(nsjail_py.ScriptRefused):
            jail.run_python("import os")


def test_a_policy_file_says_it_under_python(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('extends = "untrusted"\n[python]\nscan = "refuse"\nscan_ignore = ["open"]\n')
    jail = nsjail_py.Jail(tmp_path / "p.toml")
    assert jail.run_python("print(open('/etc/hostname').read(), end='')").stdout == b"jail\n"
    with pytest.raises(nsjail_py.ScriptRefused):
        jail.run_python("import ctypes")


def test_warn_warns_and_runs() -> None:
    with pytest.warns(ScanWarning, match="main.py:1:1: medium: import of os"):
        assert nsjail_py.run_python("import os; print(1)", scan="warn").stdout == b"1\n"


def test_a_syntax_error_is_left_to_the_interpreter_inside() -> None:
    result = nsjail_py.run_python("x = (1,", scan="refuse")
    assert result.exit_code == 1 and b"SyntaxError: '(' was never closed" in result.stderr


def test_what_cannot_be_scanned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsjail_py.layers import scan as module

    monkeypatch.setitem(module.LIMITS, "cpu_time", 0.001)
    with pytest.raises(nsjail_py.ScriptRefused, match="could not be scanned: cpu_time"):
        nsjail_py.run_python("print(1)", scan="refuse")


@pytest.mark.parametrize("said", ["'['*100_000", "'{\"findings\":' + '['*100_000", "'{\"unknown\":' + '['*100_000", "'\\x00'"])
def test_an_answer_that_a_script_makes_its_parser_write_is_read_with_bounds(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsjail_py.layers import scan as module

    monkeypatch.setattr(module.inspect, "getsource", lambda module: f"print({said})")
    with pytest.raises(nsjail_py.ScriptRefused, match="could not be scanned: the answer is not readable"):
        nsjail_py.run_python("print(1)", scan="refuse")


def test_the_scan_is_done_in_a_jail_by_the_interpreter_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile text meets no parser of this process."""
    from nsjail_py.layers import examine

    monkeypatch.setattr(examine, "examine", None)
    with pytest.raises(nsjail_py.ScriptRefused):
        nsjail_py.run_python("import os", scan="refuse")


def test_a_finding_is_one_line_that_can_be_printed() -> None:
    found = [str(one) for one in scan("__import__('os.\\x1b[31m\\n\\x85')")]
    assert all(one.isprintable() for one in found) and any("os.\\x1b[31m" in one for one in found)


def test_unknown_rules_are_told(cli: Cli) -> None:
    with pytest.raises(nsjail_py.PolicyError, match=r'scan_ignore\[0\]: .*did you mean "files"'):
        nsjail_py.Jail("untrusted", scan_ignore=("file",))
    done = subprocess.run([*cli, "scan", "--ignore", "file", "-"], input="print(1)", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        125,
        "",
        "nsjail-py: --ignore: the scan has no rule 'file' (did you mean \"files\"?)\n",
    )


def test_the_command_warns_and_refuses_in_lines(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import os\nimport os.path\nprint(1)\n")
    done = subprocess.run([*cli, "run", "--scan", "warn", tmp_path / "s.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert [line[:20] for line in done.stderr.splitlines()] == ["nsjail-py: s.py:1:1:", "nsjail-py: s.py:2:1:"]
    done = subprocess.run([*cli, "run", "--scan", "refuse", tmp_path / "s.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (125, "", 1)


def test_other_commands_import_nothing_of_the_layers() -> None:
    source = (
        "import sys, nsjail_py.cli; nsjail_py.cli.main(['exec', '--', 'true']); print([m for m in sys.modules if 'nsjail_py.layers' in m])"
    )
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, check=True).stdout == b"[]\n"
