"""The commands of nsjail-py that make policies out of runs, explain results, and speak containers' formats. cli.py hands them over."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .cli import _print, _say, _script
from .errors import PolicyError
from .options import Parser, bind, variable

if TYPE_CHECKING:
    from .observe import Observation

DENIED, FAILED = 1, 1
MAX_SEEN = 64 * 1024**2

LEARN = """Runs a script that you trust, twice, under observation (seccomp notification; the host's files read-only, no network but an own
loopback), and writes the smallest policy that runs it, with the reason beside each entry, to standard output or to FILE.
What the script prints goes to standard error.
0: it came to its end; 1: it failed, and so the policy is for a run that failed."""
BUNDLE = """Writes DIR/config.json and DIR/rootfs: the policy's view, limits and filter in the words of the OCI runtime specification.
What it has no words for is told on standard error."""
SECCOMP = """Prints [syscalls] for a policy that allows what an OCI seccomp profile allows, or less, and what no program starts without;
and as comments where it is less or more."""
COMPILE = """Writes a policy, compiled for this host and this user, to FILE, and prints where the launcher is, which runs programs under it
without Python: nsjail-launcher FILE -- CMD [ARGS...]. With --for the plan is for that program and has what it needs; the policy's
interpreter has its library, and the policy's imports. Else it is for any that needs no more than the C and C++ libraries."""
WHY = """Says what a result, written by --report or --json, tells was denied, with the lines of a policy that would allow it and the risk of
each. 0: nothing was denied; 1: something was."""


def parser() -> Parser:
    top = Parser(prog="nsjail-py")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    learn = commands.add_parser("learn", usage="nsjail-py learn [OPTIONS] SCRIPT [ARGS...]", description=LEARN)
    learn.add_argument("-o", dest="output", metavar="FILE", help="where the policy goes; by default to standard output")
    learn.add_argument("--seen", metavar="FILE", help="what earlier runs needed: taken into account, and this run added")
    learn.add_argument("--project", metavar="DIR", help="show DIR read-only at /project, on sys.path")
    learn.add_argument("--bind", action="append", default=[], metavar="SRC[:DST[:rw]]", help="show SRC inside, at DST")
    learn.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set, or pass on, a variable")
    learn.add_argument("--stdin", metavar="FILE", help="standard input comes from FILE")
    learn.add_argument("--python", dest="interpreter", metavar="PATH", help="which interpreter; by default the one that runs nsjail-py")
    learn.add_argument("script", metavar="SCRIPT")
    learn.rest("ARGS")
    learn.set_defaults(act=command_learn)
    why = commands.add_parser("why", description=WHY)
    why.add_argument("report", metavar="REPORT", help="a file that --report or --json wrote")
    why.add_argument("--policy", metavar="NAME|FILE", help="the policy of that run, where it is not a shipped one")
    why.add_argument("--json", action="store_true", help="print one JSON object")
    why.set_defaults(act=command_why)
    bundle = commands.add_parser("bundle", usage="nsjail-py bundle [--runtime NAME] POLICY DIR -- CMD [ARGS...]", description=BUNDLE)
    bundle.add_argument("--runtime", choices=("crun", "runc", "runsc"), default="", help="for which runtime, where that matters")
    bundle.add_argument("policy", metavar="POLICY", help="the name of a shipped policy, or a file")
    bundle.add_argument("directory", metavar="DIR")
    bundle.rest("CMD [ARGS...]")
    bundle.set_defaults(act=command_bundle)
    seccomp = commands.add_parser("seccomp", description=SECCOMP)
    seccomp.add_argument("profile", metavar="FILE")
    seccomp.set_defaults(act=command_seccomp)
    save = commands.add_parser("compile", usage="nsjail-py compile [--for PROGRAM] -o FILE POLICY", description=COMPILE)
    save.add_argument("policy", metavar="POLICY", help="the name of a shipped policy, or a file")
    save.add_argument("-o", dest="output", metavar="FILE", required=True, help="where the plan goes; only you can write it")
    save.add_argument("--for", dest="program", metavar="PROGRAM", help="the program that it is for")
    save.set_defaults(act=command_compile)
    return top


def command_learn(options: argparse.Namespace) -> int:
    from .learn import learn
    from .observe import dump
    from .outfile import Output
    from .policy import Mount
    from .relay import writer

    source, name = _script(options.script)
    earlier = _earlier(options.seen)
    changes: dict[str, object] = {}
    if options.project:
        changes["project"] = os.path.realpath(options.project)
    if options.bind:
        changes["mounts"] = [Mount(source=source, target=target, writable=rw) for source, target, rw in map(bind, options.bind)]
    if options.env:
        changes["env"] = dict(pair for text in options.env if "=" in text and (pair := variable(text)))
        changes["env_pass"] = [text for text in options.env if "=" not in text]  # what it is, is not for a file
    input = Path(options.stdin).read_bytes() if options.stdin else None
    with contextlib.ExitStack() as opened:
        policy = opened.enter_context(Output(options.output)) if options.output else None
        seen = opened.enter_context(Output(options.seen)) if options.seen else None
        learned = learn(source, options.arguments, name=name, python=options.interpreter, input=input, earlier=earlier, **changes)
        with contextlib.suppress(BrokenPipeError):
            writer(2)(learned.result.stdout + learned.result.stderr)
        if policy:
            policy.write(learned.text.encode())
        else:
            _print(learned.text, end="")
        if seen:
            seen.write(dump(learned.seen))
    return 0 if learned.result.ok else _say(f"the sample failed, and so the policy is for that: {learned.result.summary}", FAILED)


def _earlier(path: str | None) -> list[Observation]:
    """What --seen has of other runs, if it is there at all."""
    from .observe import load

    if not path or not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        data = file.read(MAX_SEEN)
    try:
        return [load(data)]
    except msgspec.DecodeError as error:
        raise PolicyError(f"{path}: is not what an earlier run has written: {error}") from None


def command_why(options: argparse.Namespace) -> int:
    from .policyfile import load
    from .why import read, text, why

    found = why(read(options.report), load(options.policy) if options.policy else None)
    record = [{**one._asdict(), "ways": [way._asdict() for way in one.ways]} for one in found]
    _print(json.dumps({"denials": record}, indent=2) if options.json else text(found))
    return DENIED if found else 0


def command_bundle(options: argparse.Namespace) -> int:
    from .oci_bundle import bundle

    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    for protection, reason in bundle(options.policy, options.directory, arguments, options.runtime).unavailable.items():
        _print(f"not in the bundle: {protection}: {reason}", stream=2)
    return 0


def command_seccomp(options: argparse.Namespace) -> int:
    from .oci_seccomp import load

    _print(str(load(options.profile)), end="")
    return 0


def command_compile(options: argparse.Namespace) -> int:
    from .launcher import PROGRAM
    from .saved import save

    save(options.policy, options.output, options.program)
    _print(str(PROGRAM))
    return 0


def main(arguments: list[str]) -> int:
    """Returns the exit status; errors are told by cli.main."""
    options = parser().parse_args(arguments)
    return int(options.act(options))
