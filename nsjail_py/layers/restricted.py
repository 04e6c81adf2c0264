"""The restricted tier: expressions, templates and small programs of strangers, held by RestrictedPython (extra `[restricted]`), in a jail
as always. guards.py says what such code may use.

    evaluate("price * 1.2", {"price": 10}).value           12.0
    render("Dear {{ user.name }}", {"user": {"name": "A"}}).value
    execute("result = sum(range(10))").value
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from nsjail_py.errors import PolicyError
from nsjail_py.jail import Jail
from nsjail_py.policy import Policy
from nsjail_py.policyfile import override, resolve
from nsjail_py.prepared import prepared
from nsjail_py.result import Result
from nsjail_py.unpack import decode_json

DISTRIBUTION = "RestrictedPython"
Kind = Literal["expression", "template", "program", "wrapped"]


class Answer(NamedTuple):
    """What became of restricted code."""

    value: Any
    """The expression's value, the rendered text, or the program's variable `result`; what JSON has no type for is text."""
    printed: str
    error: str
    """What was refused or went wrong, as `Type: message`; empty when nothing did."""
    result: Result
    """The jail's own record; its verdict says when a limit ended the run."""

    @property
    def ok(self) -> bool:
        return not self.error and self.result.ok


class _Error(msgspec.Struct):
    type: str
    message: str


@prepared
class _Said(msgspec.Struct):
    value: Any
    printed: str
    error: _Error | None


def evaluate(expression: str, names: Mapping[str, Any] | None = None, **options: Any) -> Answer:
    """The value of one expression. names: its variables, as JSON has them; a dictionary's entries can be read as attributes too.
    options: `modules` (facades that it may use, guards.FACADES), `policy`, and changes to the policy. Raises PolicyError where the extra
    is not installed."""
    return _run("expression", expression, names or {}, **options)


def render(template: str, names: Mapping[str, Any] | None = None, **options: Any) -> Answer:
    """The template with every `{{ expression }}` replaced by its value. Nothing is escaped: that is the caller's. Otherwise as evaluate."""
    return _run("template", template, names or {}, **options)


def execute(source: str, names: Mapping[str, Any] | None = None, *, wrapped: bool = False, **options: Any) -> Answer:
    """Runs a program; its value is the variable `result`. wrapped: ordinary Python with wrapped built-ins instead of RestrictedPython:
    a convenience that stops nobody who knows the language; the jail does. Otherwise as evaluate."""
    return _run("wrapped" if wrapped else "program", source, names or {}, **options)


def _run(
    kind: Kind,
    source: str,
    names: Mapping[str, Any],
    *,
    modules: Iterable[str] = (),
    policy: Policy | str | os.PathLike[str] = "untrusted",
    **changes: Any,
) -> Answer:
    from nsjail_py.suggest import did_you_mean

    from . import guards

    chosen = tuple(modules)
    unknown = [
        f"modules: there is no facade of {name!r}{did_you_mean(name, guards.FACADES)}" for name in chosen if name not in guards.FACADES
    ]
    if unknown:
        raise PolicyError(*unknown)
    settled = resolve(policy, **changes)
    if kind != "wrapped":
        settled = override(settled, imports=(*settled.python.imports, DISTRIBUTION))
    job = msgspec.json.encode({"kind": kind, "source": source, "names": dict(names), "modules": chosen})
    try:
        result = Jail(settled, stock=0).run_python(inspect.getsource(guards), input=job, filename="guards.py")
    except PolicyError as error:
        if DISTRIBUTION in str(error):
            raise PolicyError(f"{error}; the restricted tier needs the extra: pip install 'nsjail_py[restricted]'") from None
        raise
    if not result.ok:
        return Answer(None, "", result.summary, result)
    try:
        said = decode_json(result.stdout, _Said)
    except ValueError:  # it wrote by itself, too much, or what JSON has no word for (a lone surrogate)
        return Answer(None, "", "the answer is not readable", result)
    return Answer(said.value, said.printed, f"{said.error.type}: {said.error.message}" if said.error else "", result)
