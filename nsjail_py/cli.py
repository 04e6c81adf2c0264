"""The command `nsjail-py`: run, exec, doctor, policy. It uses what the package exports, and nothing below it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import JailError, PolicyError, SetupError

LIMIT, SETUP, CANNOT_EXECUTE, NOT_FOUND = 124, 125, 126, 127

LIMITS = {
    "--wall-time": "seconds from start to end (1.5, 500ms, 2m)",
    "--cpu-time": "seconds of processor time of all its processes",
    "--memory": "bytes of memory of all its processes (64M, 1GiB)",
    "--disk": "bytes in /work, /tmp and /dev/shm",
    "--output": "bytes written to standard output and error",
    "--processes": "processes and threads at one time",
    "--open-files": "open descriptors in one process",
    "--file-size": "bytes in one written file",
}

EPILOG = """\
exit status: the program's own; 128+n after signal n; 124 a limit was reached; 125 the jail could not be set up;
126 the program could not be executed; 127 it was not found. One line on standard error says why.

examples:
  nsjail-py run hello.py
  nsjail-py run --import numpy --memory 1G --cpu-time 10 model.py data.csv --bind ./data.csv:/work/data.csv
  nsjail-py exec --policy moderate -- /usr/bin/sort < words
  nsjail-py doctor
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nsjail-py",
        description="Run code that nobody trusts in a jail made by the Linux kernel.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a Python script", usage="nsjail-py run [OPTIONS] SCRIPT [ARGS...]")
    _jail_options(run)
    run.add_argument("--project", metavar="DIR", help="show DIR read-only at /project, on sys.path")
    run.add_argument("--import", dest="imports", action="append", default=[], metavar="NAME", help="installed distribution visible inside")
    run.add_argument("--python", dest="interpreter", metavar="PATH", help="which interpreter; by default the one that runs nsjail-py")
    run.add_argument("script", metavar="SCRIPT", help="the script; - reads it from standard input")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    run.set_defaults(act=command_run)
    execute = commands.add_parser("exec", help="run any program", usage="nsjail-py exec [OPTIONS] -- CMD [ARGS...]")
    _jail_options(execute)
    execute.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CMD [ARGS...]")
    execute.set_defaults(act=command_exec)
    doctor = commands.add_parser("doctor", help="what this host can give a jail, and how to get the rest")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(act=command_doctor)
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
    return top


def _jail_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--policy", default="untrusted", metavar="NAME|FILE", help="trusted, moderate, untrusted (default), or a file")
    for option, text in LIMITS.items():
        to.add_argument(option, metavar="N", help=text)
    to.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set, or pass on, a variable")
    to.add_argument("--bind", action="append", default=[], metavar="SRC[:DST[:rw]]", help=r"show SRC inside, at DST; \: is a colon in a path")
    to.add_argument("--root", metavar="ROOT", help="minimal, system, host, or a directory")
    to.add_argument("--workdir", metavar="DIR", help="DIR is /work: writable, and kept")
    to.add_argument("--stdin", metavar="FILE", help="standard input comes from FILE")
    to.add_argument("--report", metavar="FILE", help="write the result as JSON to FILE")
    to.add_argument("--json", action="store_true", help="print one JSON object with the result and the output in it")


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the options change in the policy."""
    from .policy import Mount

    fields = {option[2:].replace("-", "_") for option in LIMITS} | {"workdir", "project", "interpreter", "root"}
    made = {name: value for name in fields if (value := getattr(options, name, None)) is not None}
    if made.get("processes") or made.get("open_files"):
        for name in ("processes", "open_files"):
            if name in made and made[name].isdigit():
                made[name] = int(made[name])
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

    source, name = _script(options.script)
    if options.script == "-" and options.stdin is None:
        options.stdin = os.devnull
    jail = Jail(options.policy, **changes(options))
    return _supervise(options, lambda **streams: jail.start_python(source, args=options.arguments, filename=name, **streams))


def command_exec(options: argparse.Namespace) -> int:
    from .jail import Jail

    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not arguments:
        raise PolicyError("exec: no program was given: nsjail-py exec [OPTIONS] -- CMD [ARGS...]")
    jail = Jail(options.policy, **changes(options))
    return _supervise(options, lambda **streams: jail.start(arguments, **streams))


def _script(path: str) -> tuple[bytes, str]:
    if path == "-":
        return sys.stdin.buffer.read() if sys.stdin else b"", "stdin.py"
    try:
        return Path(path).read_bytes(), Path(path).name
    except (OSError, ValueError) as error:
        raise PolicyError(f"script {path!r}: {getattr(error, 'strerror', None) or error}") from None


def _supervise(options: argparse.Namespace, start: Callable[..., Any]) -> int:
    """Starts the run, carries its streams, and turns its result into a report and an exit status."""
    from .jail import PIPE

    stdin = _stdin(options.stdin)
    try:
        with start(stdin=stdin, stdout=PIPE, stderr=PIPE) as process:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda signo, frame: _stop(process, signo))
            result = process.communicate() if options.json else relay(process)
    except FileNotFoundError as error:
        return _say(f"{error.filename}: {error.strerror}", NOT_FOUND)
    except PermissionError as error:
        return _say(f"{error.filename}: {error.strerror}", CANNOT_EXECUTE)
    record = json.dumps(result.to_dict(), indent=2)
    if options.report:
        Path(options.report).write_text(record + "\n")
    if options.json:
        print(record)
    return exit_status(result)


class Stopped(Exception):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(process: Any, number: int) -> None:
    process.kill()
    raise Stopped(number)


def _stdin(path: str | None) -> int:
    """A descriptor that is safe to hand over: read-only, and never a terminal."""
    from .jail import DEVNULL, PIPE

    if path is not None:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise PolicyError(f"--stdin {path!r}: {getattr(error, 'strerror', None) or error}") from None
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return DEVNULL
    return 0 if stat.S_ISFIFO(mode) and _read_only(0) else PIPE


def _read_only(descriptor: int) -> bool:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def relay(process: Any) -> Any:
    """Carries the three streams as they come, unchanged, and counts the output."""
    limit, count = process.compiled.policy.limits.output, 0
    outputs = {process.stdout.fileno(): 1, process.stderr.fileno(): 2}
    inputs = {0: process.stdin} if process.stdin is not None else {}
    poll = select.poll()
    for descriptor in (*outputs, *inputs):
        poll.register(descriptor, select.POLLIN)
    poll.register(process.channel, select.POLLIN)
    over = False
    while outputs and not (over and not _drainable(outputs)):
        for descriptor, _ in poll.poll(0 if over else None):
            if descriptor == process.channel.fileno():
                over = over or process.hear()
                if over:
                    poll.unregister(process.channel)
                continue
            data = os.read(descriptor, 65536)
            if descriptor in inputs:
                if not (data and _write_all(inputs[descriptor].fileno(), data)):
                    poll.unregister(descriptor)
                    inputs.pop(descriptor).close()
                continue
            room = len(data) if limit is None else max(0, limit - count)
            count += len(data)
            if len(data) > room:
                process.exceeded_output()
            if not data or not _write_all(outputs[descriptor], data[:room]):
                poll.unregister(descriptor)
                (process.stdout if outputs.pop(descriptor) == 1 else process.stderr).close()
    return process.wait()


def _drainable(outputs: dict[int, int]) -> bool:
    return bool(select.select(list(outputs), [], [], 0)[0])


def _write_all(descriptor: int, data: bytes) -> bool:
    """False when nobody reads there any more."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        return False
    return True


def exit_status(result: Any) -> int:
    """The command's exit status for a result, with the reason on standard error where the program itself could not give it."""
    from .result import Verdict

    if result.verdict.is_limit:
        return _say(result.summary, LIMIT)
    if result.verdict is Verdict.exec_failed:
        return _say(result.summary, NOT_FOUND if result.evidence.get("errno") == 2 else CANNOT_EXECUTE)
    if result.verdict is Verdict.killed:
        return 128 + signal.SIGKILL
    if result.signal is not None:
        return 128 + int(result.signal)
    return int(result.exit_code)


def command_doctor(options: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor(options.json)


def policy_list(options: argparse.Namespace) -> int:
    from .policyfile import load, names

    for name in names():
        print(f"{name:12} {load(name).description}")
    return 0


def policy_show(options: argparse.Namespace) -> int:
    from .policyfile import names, source

    print(source(options.name) if options.name in names() else Path(options.name).read_text(), end="")
    return 0


def policy_check(options: argparse.Namespace) -> int:
    from .policyfile import check

    problems = check(options.file)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def policy_explain(options: argparse.Namespace) -> int:
    from .explain import sentences
    from .policyfile import load

    print("\n".join(sentences(load(options.name))))
    return 0


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
    try:
        options = parser().parse_args(argv)
    except SystemExit as error:
        return SETUP if error.code else 0
    try:
        return int(options.act(options))
    except Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (JailError, SetupError) as error:
        return _say(str(error), SETUP)
    except OSError as error:
        return _say(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), SETUP)
