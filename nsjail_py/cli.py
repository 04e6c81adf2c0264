"""The command `nsjail-py`: run, exec, doctor, selftest, policy, systemd, and those of layers/. It uses what the package exports."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from msgspec.structs import replace

from .errors import JailError, PolicyError
from .result import Result, Verdict

if TYPE_CHECKING:
    from .jail import Jail, Process

LIMIT, SETUP, CANNOT_EXECUTE, NOT_FOUND = 124, 125, 126, 127
MAX_SCRIPT = 32 * 1024**2
COUNTS = ("processes", "open_files")

LIMITS = {
    "--wall-time": "seconds from start to end (1.5, 500ms, 2m)",
    "--cpu-time": "seconds of processor time of all its processes",
    "--cpus": "processors that it may keep busy (1.5)",
    "--cpuset": "processors that it may run on (0-1,4)",
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
exit status: the program's own; 128+n after signal n; 124 a limit was reached; 125 the jail could not be set up;
126 the program could not be executed; 127 it was not found. From 124 on one line on standard error says why.

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
what follows it is its own. Standard input is read ahead of the program, as ssh does: --stdin /dev/null leaves it to others.
"""


class Parser(argparse.ArgumentParser):
    """One line for a fault, as for every other; no option is guessed from its beginning, for a guess may be a wrong limit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise PolicyError(f"{message} (see {self.prog} --help)")


def parser(listed: bool = True) -> Parser:
    """listed: whether the commands of layers/ are there to be listed; run and exec do without the time that it takes."""
    top = Parser(prog="nsjail-py", description="Run code that nobody trusts in a jail made by the Linux kernel.", epilog=EPILOG)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a Python script", usage="nsjail-py run [OPTIONS] SCRIPT [ARGS...]", epilog=STREAMS)
    _jail_options(run)
    run.add_argument("--project", metavar="DIR", help="show DIR read-only at /project, on sys.path")
    run.add_argument("--import", dest="imports", action="append", default=[], metavar="NAME", help="installed distribution visible inside")
    run.add_argument("--python", dest="interpreter", metavar="PATH", help="which interpreter; by default the one that runs nsjail-py")
    run.add_argument("--scan", metavar="HOW", help="off, warn or refuse: what to do about what the script's text shows")
    run.add_argument("script", metavar="SCRIPT", help="the script; - reads it from standard input")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    run.set_defaults(act=command_run)
    execute = commands.add_parser("exec", help="run any program", usage="nsjail-py exec [OPTIONS] -- CMD [ARGS...]", epilog=STREAMS)
    _jail_options(execute)
    execute.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CMD [ARGS...]")
    execute.set_defaults(act=command_exec)
    doctor = commands.add_parser("doctor", help="what this host can give a jail, and how to get the rest")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(act=command_doctor)
    selftest = commands.add_parser("selftest", help="attack a jail of a policy on this machine, and show what held")
    selftest.add_argument("--policy", default="untrusted", metavar="NAME|FILE", help="trusted, moderate, untrusted (default), or a file")
    selftest.add_argument("--json", action="store_true", help="print one JSON object")
    selftest.set_defaults(act=command_selftest)
    policy = commands.add_parser("policy", help="list, show, check and explain policies")
    actions = policy.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the shipped policies").set_defaults(act=policy_list)
    for name, act, text in (("show", policy_show, "print a policy file"), ("explain", policy_explain, "say it in sentences")):
        action = actions.add_parser(name, help=text)
        action.add_argument("name", metavar="NAME|FILE")
        action.set_defaults(act=act)
    check = actions.add_parser("check", help="all faults of a policy file")
    check.add_argument("file", metavar="FILE")
    check.set_defaults(act=policy_check)
    systemd = commands.add_parser("systemd", help="write a hardened unit that runs a program in a jail")
    actions = systemd.add_subparsers(dest="action", required=True, metavar="ACTION")
    unit = actions.add_parser(
        "unit", help="the unit, or with --listen a socket too", usage="nsjail-py systemd unit [OPTIONS] POLICY -- CMD [ARGS...]"
    )
    unit.add_argument("--name", default="jail", help="of the unit's files, without .service (default: jail)")
    unit.add_argument("--user", default="", help="who runs it; by default root, who gives each run a user id of its own")
    unit.add_argument("--listen", default="", metavar="ADDRESS", help="a path or HOST:PORT: each connection is one run")
    unit.add_argument("--output", metavar="DIR", help="write the files there (/etc/systemd/system) instead of printing them")
    unit.add_argument("policy", metavar="POLICY")
    unit.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- CMD [ARGS...]")
    unit.set_defaults(act=systemd_unit)
    apparmor = commands.add_parser("apparmor", help="print an AppArmor profile: for our launcher, or a sample for programs")
    apparmor.add_argument("profile", choices=["launcher", "sample"])
    apparmor.set_defaults(act=apparmor_profile)
    for name, text in (LAYERS | TOOLS).items() if listed else ():
        commands.add_parser(name, help=text)
    return top


def _jail_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--policy", default="untrusted", metavar="NAME|FILE", help="trusted, moderate, untrusted (default), or a file")
    for option, text in LIMITS.items():
        to.add_argument(option, metavar="N", help=text)
    to.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set, or pass on, a variable")
    to.add_argument("--bind", action="append", default=[], metavar="SRC[:DST[:rw]]", help=r"show SRC inside, at DST (\: is a colon)")
    to.add_argument("--root", metavar="ROOT", help="minimal, system, host, or a directory")
    to.add_argument("--workdir", metavar="DIR", help="DIR is /work: writable, and kept")
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
        if name in made:
            made[name] = str(Path(made[name]).resolve())
    if getattr(options, "imports", None):
        made["imports"] = tuple(options.imports)
    if options.bind:
        made["mounts"] = [Mount(source=source, target=target, writable=rw) for source, target, rw in map(bind, options.bind)]
    if options.env:
        made["env"] = {name: value for text in options.env if (pair := variable(text)) for name, value in [pair]}
    return made


def bind(text: str) -> tuple[str, str, bool]:
    r"""`SRC[:DST[:rw]]`, with `\:` and `\\` for a colon and a backslash in a path."""
    parts = [re.sub(r"\\([\\:])", r"\1", part) for part in re.split(r"(?<!\\):", text)]
    if len(parts) > 3 or not all(parts) or (len(parts) == 3 and parts[2] not in ("rw", "ro")):
        raise PolicyError(f"--bind {text!r} is not SRC[:DST[:rw]]; write \\: for a colon in a path")
    source = str(Path(parts[0]).absolute())
    return source, parts[1] if len(parts) > 1 else source, parts[2:] == ["rw"]


def variable(text: str) -> tuple[str, str] | None:
    """`NAME=VALUE`, or `NAME` with the value it has here; None when it has none."""
    name, equals, value = text.partition("=")
    if not name:
        raise PolicyError(f"--env {text!r} has no name")
    if not equals:
        return (name, os.environ[name]) if name in os.environ else None
    return name, value


def command_run(options: argparse.Namespace) -> int:
    from .jail import Jail

    if options.script == "-" and options.stdin is None:
        options.stdin = os.devnull  # the script is what stands there
    source, name = _script(options.script)
    jail = Jail(options.policy, stock=0, **changes(options))
    if jail.policy.python.scan == "warn":
        from .layers.commands import warn_on_standard_error

        warn_on_standard_error()
    return _supervise(options, jail, lambda **streams: jail.start_python(source, args=options.arguments, filename=name, **streams))


def command_exec(options: argparse.Namespace) -> int:
    from .jail import Jail

    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not arguments:
        raise PolicyError("exec: no program was given: nsjail-py exec [OPTIONS] -- CMD [ARGS...]")
    jail = Jail(options.policy, stock=0, **changes(options))
    return _supervise(options, jail, lambda **streams: jail.start(arguments, **streams))


def _script(path: str) -> tuple[bytes, str]:
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            source = file.read(MAX_SCRIPT + 1)
    except (OSError, ValueError) as error:
        raise PolicyError(f"script {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if len(source) > MAX_SCRIPT:
        raise PolicyError(f"script {path!r}: larger than {MAX_SCRIPT} bytes")
    return source, "stdin.py" if path == "-" else Path(path).name


def _supervise(options: argparse.Namespace, jail: Jail, start: Callable[..., Process]) -> int:
    """Starts the run, carries its streams, and turns its result into a report and an exit status."""
    from .jail import PIPE
    from .relay import Relay, writer

    _standard_input(options.stdin)
    kept = bytearray(), bytearray()
    stdout, stderr = (kept[0].extend, kept[1].extend) if options.json else (writer(1), writer(2))
    with contextlib.ExitStack() as open_files:
        # Opened before the run: afterwards it is too late to fail.
        report = open_files.enter_context(open(options.report, "w")) if options.report else None
        try:
            with start(stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, lambda signo, frame: _stop(process, signo))
                result = Relay(process, 0, stdout, stderr, jail.policy.limits.output).run()
        except FileNotFoundError as error:
            return _say(f"{error.filename}: {error.strerror}", NOT_FOUND)
        except PermissionError as error:
            return _say(f"{error.filename}: {error.strerror}", CANNOT_EXECUTE)
        if report:
            report.write(_json(_record(result)) + "\n")
    if options.json:
        over = result.verdict is Verdict.output
        result = replace(result, stdout=bytes(kept[0]), stderr=bytes(kept[1]), stdout_cut=over, stderr_cut=over)
        _print(_json(result.to_dict()))
    from . import systemd

    if systemd.has_journal():
        systemd.journal(result)
    return exit_status(result)


class Stopped(Exception):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(process: Process, number: int) -> None:
    process.kill()
    raise Stopped(number)


def _standard_input(path: str | None) -> None:
    """Makes a file our own standard input, as a shell's `<` does. A directory would be a way out of any jail."""
    if path is not None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            raise PolicyError(f"--stdin {path!r}: {getattr(error, 'strerror', None) or error}") from None
        os.dup2(descriptor, 0)
        os.close(descriptor)
    if stat.S_ISDIR(os.fstat(0).st_mode):
        raise PolicyError(f"{'standard input' if path is None else f'--stdin {path!r}'}: is a directory")


def _record(result: Result) -> dict[str, Any]:
    """The result for a report, without output: that went where the caller wanted it."""
    return {name: value for name, value in result.to_dict().items() if not name.startswith(("stdout", "stderr"))}


def exit_status(result: Result) -> int:
    """The command's exit status for a result, with the reason on standard error where the program itself could not give it."""
    if result.verdict.is_limit:
        return _say(result.summary, LIMIT)
    if result.verdict is Verdict.exec_failed:
        return _say(result.summary, NOT_FOUND if result.evidence.get("errno") == 2 else CANNOT_EXECUTE)
    if result.verdict is Verdict.killed:
        return _say(result.summary, 128 + signal.SIGKILL)
    if result.signal is not None:
        return 128 + int(result.signal)
    return int(result.exit_code or 0)


def command_doctor(options: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor(options.json)


def command_selftest(options: argparse.Namespace) -> int:
    from .selftest import main as selftest

    return selftest(options.policy, options.json)


def systemd_unit(options: argparse.Namespace) -> int:
    from .policyfile import load, names
    from .unitfile import unit

    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not command or command[0].startswith("-"):
        raise PolicyError("systemd unit: no program was given: nsjail-py systemd unit [OPTIONS] POLICY -- CMD [ARGS...]")
    named = options.policy if options.policy in names() else str(Path(options.policy).resolve())
    files = unit(load(options.policy), named, command, options.name, options.user, options.listen)
    for name, text in files.items():
        if options.output:
            (Path(options.output) / name).write_text(text)
            _print(str(Path(options.output) / name))
        else:
            _print(f"# /etc/systemd/system/{name}\n{text}")
    return 0


def apparmor_profile(options: argparse.Namespace) -> int:
    from .apparmor import profile

    _print(profile(options.profile), end="")
    return 0


def policy_list(options: argparse.Namespace) -> int:
    from .policyfile import load, names

    _print("\n".join(f"{name:12} {load(name).description}" for name in names()))
    return 0


def policy_show(options: argparse.Namespace) -> int:
    from .policyfile import load, locate

    path = locate(options.name)
    load(path)  # a file that is no policy is told as one
    _print(path.read_text(), end="")
    return 0


def policy_check(options: argparse.Namespace) -> int:
    from .policyfile import check

    problems = check(options.file)
    _print("\n".join(problems) if problems else f"{options.file}: good")
    return 1 if problems else 0


def policy_explain(options: argparse.Namespace) -> int:
    from .explain import sentences
    from .policyfile import load

    _print("\n".join(sentences(load(options.name))))
    return 0


def _json(record: dict[str, Any]) -> str:
    import json

    return json.dumps(record, indent=2)


def _print(text: str, end: str = "\n", stream: int = 1) -> None:
    """UTF-8 whatever the locale says. A reader that has left is no fault of ours."""
    from .relay import writer

    with contextlib.suppress(BrokenPipeError):
        writer(stream)((text + end).encode(errors="backslashreplace"))


def _say(text: str, status: int) -> int:
    with contextlib.suppress(OSError, AttributeError):
        os.write(2, f"nsjail-py: {' '.join(text.split())}\n".encode(errors="backslashreplace"))
    return status


def _open_standard_streams() -> None:
    """Where the caller closed one, /dev/null takes its number: else a pipe of ours would get it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns the exit status."""
    _open_standard_streams()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments[:1] and arguments[0] in LAYERS:
            from .layers.commands import main as layers

            return layers(arguments)
        if arguments[:1] and arguments[0] in TOOLS:
            from .toolcommands import main as tools

            return tools(arguments)
        options = parser(arguments[:1] not in (["run"], ["exec"])).parse_args(arguments)
        return int(options.act(options))
    except SystemExit as ended:  # --help
        return int(ended.code or 0)
    except Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except JailError as error:
        return _say(str(error), SETUP)
    except OSError as error:
        return _say(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), SETUP)
