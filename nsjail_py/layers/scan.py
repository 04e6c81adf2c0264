"""The scan: what a script would do, as far as its text tells, before it runs. A friendly early answer and no boundary: docs/layers.md
says what it cannot see.

scan()        for text that you hold; parses in this process
before_run()  what `scan = "warn"` or `"refuse"` in a policy's [python] table does; parses in a jail, with the interpreter of the policy
"""

from __future__ import annotations

import base64
import inspect
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from nsjail_py.coding import as_file
from nsjail_py.errors import ScriptRefused
from nsjail_py.oneline import one_line
from nsjail_py.prepared import prepared
from nsjail_py.unpack import decode_json

from .rules import HARMLESS_DUNDERS, RULES, SEVERITIES, Rule, Severity

if TYPE_CHECKING:
    from nsjail_py.policy import Policy

REFUSED: tuple[Severity, ...] = ("high", "medium")
"""What `scan = "refuse"` refuses; the rest is told only by `nsjail-py scan` and `scan = "warn"`."""
KINDS = {"SyntaxError": SyntaxError, "IndentationError": IndentationError, "TabError": TabError}
LIMITS = {"wall_time": 20.0, "cpu_time": 10.0, "memory": 512 * 1024**2, "output": 4 * 1024**2}


class ScanWarning(UserWarning):
    """One finding in a script that is run under `scan = "warn"`."""


class Finding(NamedTuple):
    """One place in a script. Lines and columns begin with 1; columns are characters."""

    line: int
    column: int
    rule: str
    severity: Severity
    what: str
    sentence: str
    advice: str

    def __str__(self) -> str:
        return one_line(f"{self.line}:{self.column}: {self.severity}: {self.what}: {self.sentence} {self.advice} [{self.rule}]")


class _Place(msgspec.Struct):
    rule: str
    line: int
    column: int
    what: str


class _Fault(msgspec.Struct):
    kind: Literal["SyntaxError", "IndentationError", "TabError"]
    message: str
    line: int | None
    column: int | None
    text: str
    end_line: int | None
    end_column: int | None


@prepared
class _Answer(msgspec.Struct):
    findings: list[_Place]
    syntax_error: _Fault | None


def scan(source: str | bytes, *, ignore: Iterable[str] = ()) -> tuple[Finding, ...]:
    """What the rules find, in the order of the text. ignore: names of rules to leave out. Raises SyntaxError as compile() would.

    It parses in this process: for code from an enemy `nsjail_py.Jail(..., scan="refuse")` does it in a jail.
    """
    from .examine import examine

    return _findings(msgspec.convert(examine(as_file(source), *_rules(ignore)), _Answer))


def before_run(policy: Policy, source: bytes, filename: str) -> None:
    """Does what the policy says about findings. Raises ScriptRefused; warns with ScanWarning. A script that is no Python is left to the
    interpreter, which says so better."""
    try:
        found = _scan_jailed(policy, source)
    except SyntaxError:
        return
    if policy.python.scan == "refuse":
        refused = [one for one in found if one.severity in REFUSED]
        if refused:
            raise ScriptRefused(filename, refused)
    else:
        for one in found:
            warnings.warn(f"{filename}:{one}", ScanWarning, stacklevel=2)


def _scan_jailed(policy: Policy, source: bytes) -> tuple[Finding, ...]:
    from nsjail_py import policyfile
    from nsjail_py.jail import Jail

    from . import examine

    python = policy.python.interpreter
    own = policyfile.override(policyfile.load("untrusted"), best_effort=policy.best_effort, interpreter=python, **LIMITS)
    jail = Jail(own, stock=0)
    rules, harmless = _rules(policy.python.scan_ignore)
    job = msgspec.json.encode({"source": base64.b64encode(source).decode(), "rules": rules, "harmless": harmless})
    result = jail.run_python(inspect.getsource(examine), input=job, filename="scan.py")
    try:
        return _findings(decode_json(result.stdout if result.ok else b"", _Answer))
    except (ValueError, KeyError):
        reason = "the answer is not readable" if result.ok else result.summary
        raise ScriptRefused("script", (), f"it could not be scanned: {reason}") from None


def _rules(ignore: Iterable[str]) -> tuple[list[dict[str, object]], list[str]]:
    left_out = set(ignore)
    return [rule._asdict() for rule in RULES if rule.name not in left_out], list(HARMLESS_DUNDERS)


def _findings(answer: _Answer) -> tuple[Finding, ...]:
    if answer.syntax_error:
        fault = answer.syntax_error
        raise KINDS[fault.kind](fault.message, (None, fault.line, fault.column, fault.text, fault.end_line, fault.end_column))
    rules: dict[str, Rule] = {rule.name: rule for rule in RULES}
    named = [(place, rules[place.rule]) for place in answer.findings]
    return tuple(Finding(p.line, p.column, rule.name, rule.severity, p.what, rule.sentence, rule.advice) for p, rule in named)


__all__ = ["REFUSED", "SEVERITIES", "Finding", "ScanWarning", "before_run", "scan"]
