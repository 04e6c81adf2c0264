"""The commands of nsjail-py that belong to layers/: scan, imports, layers, posture. cli.py hands them over and imports this late."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

from nsjail_py.cli import _print, _say, _script
from nsjail_py.errors import PolicyError
from nsjail_py.oneline import one_line
from nsjail_py.options import Parser
from nsjail_py.suggest import did_you_mean

FOUND, NO_PYTHON = 1, 2


def parser() -> Parser:
    top = Parser(prog="nsjail-py")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scan = commands.add_parser("scan", help="what a script's text shows", description=SCAN)
    scan.add_argument("file", metavar="FILE", help="the script; - reads it from standard input")
    scan.add_argument("--json", action="store_true", help="print one JSON object")
    scan.add_argument("--ignore", action="append", default=[], metavar="RULE", help="leave a rule out")
    scan.set_defaults(act=command_scan)
    imports = commands.add_parser("imports", help="the list of imports that a script needs", description=IMPORTS)
    imports.add_argument("file", metavar="FILE", help="the script; - reads it from standard input")
    imports.add_argument("--json", action="store_true", help="print one JSON object")
    imports.add_argument("--python", dest="interpreter", metavar="PATH", help="whose packages; by default those of nsjail-py")
    imports.set_defaults(act=command_imports)
    layers = commands.add_parser("layers", help="reports about the layers")
    actions = layers.add_subparsers(dest="action", required=True, metavar="ACTION")
    report = actions.add_parser("report", help="the bypass catalogue under each layer", description=REPORT)
    report.add_argument("--policy", default="untrusted", metavar="NAME|FILE", help="the policy that the payloads meet (default: untrusted)")
    report.add_argument("--only", action="append", default=[], metavar="NAME", help="only this payload, or this family; again for more")
    report.add_argument(
        "--patience", type=_factor, default=1.0, metavar="FACTOR", help="how many times as long a payload may take (default: 1)"
    )
    report.add_argument("--html", metavar="FILE", help="write a page with what each layer said")
    report.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.set_defaults(act=command_report)
    posture = commands.add_parser("posture", help="for which code a policy is fit", description=POSTURE)
    posture.add_argument("policy", metavar="NAME|FILE")
    posture.add_argument("--json", action="store_true", help="print one JSON object")
    posture.add_argument("--html", metavar="FILE", help="write it as a page")
    posture.add_argument("--require", choices=("trusted", "moderate", "untrusted"), help="fail unless it is fit for this code")
    posture.set_defaults(act=command_posture)
    return top


SCAN = """Looks at what a script would do, as far as its text tells. 0: nothing found; 1: findings; 2: it is no Python.
docs/layers.md says what it cannot see; the jail does not depend on it."""
IMPORTS = """Prints the line for [python] in a policy that lets a script import what it imports.
0: all is known; 1: something is not; 2: it is no Python."""


REPORT = """Runs small scripts, each with one idea of how to get past a layer of Python, under each such layer alone and in a jail
under the policy. They touch nothing but canaries that are made for them.
0: nothing happened to the host under the policy; 1: something did."""


POSTURE = """Says for which code a policy is fit on this host: a level, and for each exposure what enforces it, what is left, and what
to change. 0, or 1 when --require asks for more, or when this host cannot give what the policy requires."""


def command_scan(options: argparse.Namespace) -> int:
    from .rules import known
    from .scan import scan

    for rule in options.ignore:
        if rule not in known():
            raise PolicyError(f"--ignore: the scan has no rule {rule!r}{did_you_mean(rule, known())}")
    source, name = _script(options.file)
    try:
        found = scan(source, ignore=options.ignore)
    except SyntaxError as error:
        return _no_python(error, name, options.json)
    if options.json:
        _print(json.dumps({"file": name, "findings": [one._asdict() for one in found], "syntax_error": None}, indent=2))
    elif found:
        _print("\n".join(f"{name}:{one}" for one in found))
    return FOUND if found else 0


def _no_python(error: SyntaxError, name: str, as_json: bool) -> int:
    """As Python would say it."""
    error.filename = name
    if as_json:
        fault = {"message": error.msg, "line": error.lineno, "column": error.offset}
        _print(json.dumps({"file": name, "findings": [], "syntax_error": fault}, indent=2))
    else:
        said = "".join(traceback.format_exception_only(error)).split("\n")
        _print("\n".join(map(one_line, said)), end="", stream=2)
    return NO_PYTHON


def command_imports(options: argparse.Namespace) -> int:
    from .imports import propose

    source, name = _script(options.file)
    beside = [] if options.file == "-" else [str(Path(options.file).absolute().parent)]
    try:
        found = propose(source, interpreter=options.interpreter, project=beside)
    except SyntaxError as error:
        return _no_python(error, name, options.json)
    _print(json.dumps(found._asdict(), indent=2) if options.json else str(found))
    return FOUND if found.unresolved else 0


def _factor(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 <= (factor := float(text)) <= 1000:
            return factor
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1000")


def command_report(options: argparse.Namespace) -> int:
    from nsjail_py.suggest import did_you_mean

    from . import tables
    from .catalogue import payloads
    from .report import POLICY, report

    known = {payload.name for payload in payloads()} | {payload.family for payload in payloads()}
    for name in options.only:
        if name not in known:
            raise PolicyError(f"--only: no payload and no family {name!r}{did_you_mean(name, known)}")
    chosen = [one for one in payloads() if not options.only or one.name in options.only or one.family in options.only]
    done = report(options.policy, only=chosen, patience=options.patience, progress=_progress)
    for file, form in ((options.html, tables.html), (options.markdown, tables.markdown)):
        if file:
            Path(file).write_text(form(done), encoding="utf-8", errors="backslashreplace")
    _print(json.dumps(tables.to_dict(done), indent=2) if options.json else tables.text(done))
    stopped, working = done.score(POLICY)
    return FOUND if stopped < working else 0


def command_posture(options: argparse.Namespace) -> int:
    from .posture import LEVELS, html, posture, text, to_dict

    found = posture(options.policy)
    if options.html:
        Path(options.html).write_text(html(found), encoding="utf-8", errors="backslashreplace")
    _print(json.dumps(to_dict(found), indent=2) if options.json else text(found))
    wanted = {"trusted": 0, "moderate": 1, "untrusted": 2}[options.require or "trusted"]
    return FOUND if found.refused or LEVELS.index(found.level) < wanted else 0


def _progress(done: int, of: int) -> None:
    if os.isatty(2):
        _print(f"\r{done} of {of} payloads", end="\n" if done == of else "", stream=2)


def warn_on_standard_error() -> None:
    """One line on standard error for each warning of the scan, however often it was seen before."""
    from .scan import ScanWarning

    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ScanWarning):
            _say(str(message), 0)
        else:
            usual(message, category, *rest, **more)

    warnings.simplefilter("always", ScanWarning)
    warnings.showwarning = show


def main(arguments: list[str]) -> int:
    """Returns the exit status; errors are told by cli.main."""
    options = parser().parse_args(arguments)
    return int(options.act(options))
