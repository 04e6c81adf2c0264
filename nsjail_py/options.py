"""The options of the command `nsjail-py`, and what they change in a policy. cli.py acts on them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import PolicyError

COUNTS = ("processes", "open_files")

LIMITS = {
    "--wall-time": "seconds from start to end (1.5, 500ms, 2m)",
    "--cpu-time": "seconds of processor time of all its processes",
    "--cpus": "processors that it may keep busy (1.5)",
    "--cpuset": "processors that it may run on (0-1,4)",
    "--io": "bytes a second from each disk, and to it (20M)",
    "--memory": "bytes of memory of all its processes (64M, 1GiB)",
    "--disk": "bytes in /work, /tmp and /dev/shm",
    "--output": "bytes written to standard output and error",
    "--processes": "processes and threads at one time",
    "--open-files": "open descriptors in one process",
    "--file-size": "bytes in one written file",
}

LAYERS = {
    "scan": "what a script's text shows, before it runs",
    "imports": "the `imports = [...]` that a script needs",
    "layers": "what each layer of Python, and a policy, make of a catalogue of attacks",
    "posture": "for which code a policy is fit, and what is left",
}
"""Commands of layers/commands.py, which is imported for none but them."""

TOOLS = {
    "learn": "run a trusted script under observation, and write the smallest policy for it",
    "bundle": "a policy and a program as an OCI runtime bundle, for crun, runc and runsc",
    "seccomp": "an OCI seccomp profile as [syscalls] of a policy",
    "compile": "a policy, compiled for this host, in a file: the launcher alone runs programs under it, without Python",
    "why": "what a result says was denied, and the lines of a policy that would allow it",
}
"""Commands of toolcommands.py, in the same way."""

EPILOG = """\
exit status: the program's own; 128+n after signal n; 124 a limit was reached; 126 the program could not be
executed; 127 it was not found; 125 anything else that kept it from running, or its result from being told: a jail
that could not be set up, a wrong option, policy or script, a report or output that could not be written. With
124 to 127 one line on standard error says why; without that line the status is the program's own. The other
commands: 0; 1 for what they found, where their help says so; 125 where they could not do it.

examples:
  nsjail-py run hello.py
  nsjail-py run --import numpy --memory 1G --cpu-time 10 --bind data.csv:/data.csv model.py /data.csv
  nsjail-py exec --policy moderate -- /usr/bin/sort < words
  nsjail-py policy explain untrusted
  nsjail-py doctor
"""
STREAMS = """\
Inside, /work is the current directory and HOME; it is empty and thrown away, unless --workdir names a directory to keep.
Nothing of the host is visible but what the policy, --bind, --project and --import show. Options stand before the program;
what follows it is its own. Standard input is read before the program asks for it, as ssh does:
in a loop of a shell, --stdin /dev/null leaves it to the next command.
"""


def _formatter(prog: str) -> argparse.HelpFormatter:
    """argparse makes one for every option that is added, and without a width loads shutil and three compressors to find one."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns
    except (OSError, ValueError):
        columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=columns - 2)


DOCTOR = """Says what this host can give a jail, and how to get the rest.
0: the default policy can be applied in full; 1: it cannot."""
SELFTEST = """Attacks a jail of a policy on this machine, and shows what held. 0: every promise held; 1: one did not."""
CHECK = """Tells all faults of a policy file. 0: it has none; 1: it has some."""


class Parser(argparse.ArgumentParser):
    """One line for a fault, as for every other; no option is guessed from its beginning, for a guess may be a wrong limit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_formatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command refuses what it does not know itself, so that the line names its own help."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def rest(self, metavar: str) -> None:
        """What follows is the program's own; there may be nothing, which argparse would call missing."""
        self.add_argument("arguments", nargs=argparse.REMAINDER, metavar=metavar).required = False

    def error(self, message: str) -> NoReturn:
        raise PolicyError(f"{message} (see {self.prog} --help)")


def parser(only: str = "", listed: bool = True) -> Parser:
    """only: the command of COMMANDS that is asked for; a run does without the time that all take. listed: with those of layers/."""
    top = Parser(prog="nsjail-py", description="Run code that nobody trusts in a jail made by the Linux kernel.", epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"nsjail-py {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=top.prog)
    for name, (text, options) in COMMANDS.items():
        if only in ("", name):
            options(commands.add_parser(name, help=text))
    for name, text in (LAYERS | TOOLS).items() if listed and not only else ():
        commands.add_parser(name, help=text)
    return top


def _run_options(run: Parser) -> None:
    run.usage, run.epilog = "nsjail-py run [OPTIONS] SCRIPT [ARGS...]", STREAMS
    _jail_options(run)
    run.add_argument("--project", metavar="DIR", help="show DIR read-only at /project, on sys.path")
    run.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="NAME",
        help="installed distribution visible inside; again for more",
    )
    run.add_argument("--python", dest="interpreter", metavar="PATH", help="which interpreter; by default the one that runs nsjail-py")
    run.add_argument("--scan", metavar="HOW", help="off, warn or refuse: what to do about what the script's text shows")
    run.add_argument("script", metavar="SCRIPT", help="the script; - reads it from standard input")
    run.rest("ARGS")


def _exec_options(execute: Parser) -> None:
    execute.usage, execute.epilog = "nsjail-py exec [OPTIONS] -- CMD [ARGS...]", STREAMS
    _jail_options(execute)
    execute.rest("CMD [ARGS...]")


def _doctor_options(doctor: Parser) -> None:
    doctor.description = DOCTOR
    doctor.add_argument("--json", action="store_true", help="print one JSON object")


def _selftest_options(selftest: Parser) -> None:
    selftest.description = SELFTEST
    selftest.add_argument("--policy", default="untrusted", metavar="NAME|FILE", help="trusted, moderate, untrusted (default), or a file")
    selftest.add_argument("--json", action="store_true", help="print one JSON object")


def _policy_options(policy: Parser) -> None:
    actions = policy.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the shipped policies")
    for name, text in (("show", "print a policy file"), ("explain", "say it in sentences")):
        actions.add_parser(name, help=text).add_argument("name", metavar="NAME|FILE")
    check = actions.add_parser("check", help="all faults of a policy file", description=CHECK)
    check.add_argument("file", metavar="FILE")


def _systemd_options(systemd: Parser) -> None:
    actions = systemd.add_subparsers(dest="action", required=True, metavar="ACTION")
    unit = actions.add_parser(
        "unit", help="the unit, or with --listen a socket too", usage="nsjail-py systemd unit [OPTIONS] POLICY -- CMD [ARGS...]"
    )
    unit.add_argument("--name", default="jail", help="of the unit's files, without .service (default: jail)")
    unit.add_argument("--user", default="", help="who runs it; by default root, who gives each run a user id of its own")
    unit.add_argument("--listen", default="", metavar="ADDRESS", help="a path, PORT or HOST:PORT: each connection is one run")
    unit.add_argument("--output", metavar="DIR", help="write the files there (/etc/systemd/system) instead of printing them")
    unit.add_argument("policy", metavar="POLICY")
    unit.rest("-- CMD [ARGS...]")


def _apparmor_options(apparmor: Parser) -> None:
    apparmor.add_argument("profile", choices=["launcher", "sample"])


def _selinux_options(selinux: Parser) -> None:
    selinux.add_argument("module", choices=["sample"])


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "run": ("run a Python script", _run_options),
    "exec": ("run any program", _exec_options),
    "doctor": ("what this host can give a jail, and how to get the rest", _doctor_options),
    "selftest": ("attack a jail of a policy on this machine, and show what held", _selftest_options),
    "policy": ("list, show, check and explain policies", _policy_options),
    "systemd": ("write a hardened unit that runs a program in a jail", _systemd_options),
    "apparmor": ("print an AppArmor profile: for our launcher, or a sample for programs", _apparmor_options),
    "selinux": ("print a module of SELinux policy: a sample for programs", _selinux_options),
}


def _jail_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--policy", default="untrusted", metavar="NAME|FILE", help="trusted, moderate, untrusted (default), or a file")
    for option, text in LIMITS.items():
        to.add_argument(option, metavar="N", help=text)
    to.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set, or pass on, a variable")
    to.add_argument("--bind", action="append", default=[], metavar="SRC[:DST[:rw]]", help=r"show SRC inside, at DST (\: is a colon)")
    to.add_argument("--root", metavar="ROOT", help="minimal, system, host, a directory, or oci:PATH[:TAG]")
    to.add_argument(
        "--workdir", metavar="DIR", help="DIR is /work: writable, and kept; as root, one of root's is given to an id that no run has"
    )
    to.add_argument("--stdin", metavar="FILE", help="standard input comes from FILE")
    to.add_argument("--report", metavar="FILE", help="write the result as JSON to FILE")
    to.add_argument("--json", action="store_true", help="print one JSON object with the result and the output in it")


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the options change in the policy."""
    from .policy import Mount

    fields = {option[2:].replace("-", "_") for option in LIMITS} | {"workdir", "project", "interpreter", "root", "scan"}
    made = {name: value for name in fields if (value := getattr(options, name, None)) is not None}
    for name in COUNTS:
        if re.fullmatch("-?[0-9]{1,30}", made.get(name, "")):
            made[name] = int(made[name])
    if re.fullmatch(r"-?[0-9]{1,30}(\.[0-9]{1,30})?", made.get("cpus", "")):
        made["cpus"] = float(made["cpus"])
    for name in ("workdir", "project"):
        if made.get(name) == "":
            raise PolicyError(f"--{name}: the path is empty; `.` is the current directory")
        if name in made:
            made[name] = os.path.realpath(made[name])
    if getattr(options, "imports", None):
        made["imports"] = tuple(options.imports)
    if options.bind:
        made["mounts"] = [Mount(source=source, target=target, writable=rw) for source, target, rw in map(bind, options.bind)]
    if options.env:
        made["env"] = {name: value for text in options.env if (pair := variable(text)) for name, value in [pair]}
    return made


def bind(text: str) -> tuple[str, str, bool]:
    r"""`SRC[:DST[:rw]]`, with `\:` and `\\` for a colon and a backslash in a path."""
    path = r"((?:\\[\\:]|\\(?![\\:])|[^\\:])+)"
    found = re.fullmatch(f"{path}(?::{path})?(?::(rw|ro))?", text)
    if found is None:
        raise PolicyError(f"--bind {text!r} is not SRC[:DST[:rw]]; write \\: for a colon in a path")
    source, target = (re.sub(r"\\([\\:])", r"\1", part or "") for part in found.group(1, 2))
    source = str(Path(source).absolute())
    return source, target or source, found[3] == "rw"


def variable(text: str) -> tuple[str, str] | None:
    """`NAME=VALUE`, or `NAME` with the value it has here; None when it has none."""
    name, equals, value = text.partition("=")
    if not name:
        raise PolicyError(f"--env {text!r} has no name")
    if not equals:
        return (name, os.environ[name]) if name in os.environ else None
    return name, value
