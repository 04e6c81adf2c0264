"""The command `nsjail-py`: run, exec, doctor, selftest, policy, systemd, and those of layers/. It uses what the package exports."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from .errors import JailError, PolicyError
from .oneline import one_line
from .options import COMMANDS, LAYERS, TOOLS, changes, parser
from .result import Result, Verdict

if TYPE_CHECKING:
    from .jail import Jail, Process

LIMIT, SETUP, CANNOT_EXECUTE, NOT_FOUND = 124, 125, 126, 127
MAX_SCRIPT = 32 * 1024**2


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


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each asks the command to end."""


def _supervise(options: argparse.Namespace, jail: Jail, start: Callable[..., Process]) -> int:
    """Starts the run, carries its streams, and turns its result into a report and an exit status."""
    from .jail import PIPE
    from .outfile import Output
    from .relay import Relay, writer

    _standard_input(options.stdin)
    kept = bytearray(), bytearray()
    stdout, stderr = (kept[0].extend, kept[1].extend) if options.json else (writer(1), writer(2))
    with contextlib.ExitStack() as open_files:
        report = open_files.enter_context(Output(options.report)) if options.report else None
        try:
            with start(stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
                for number in STOPPING:
                    if signal.getsignal(number) is not signal.SIG_IGN:  # which our caller wants, as under nohup
                        signal.signal(number, lambda signo, frame: _stop(process, signo))
                result = Relay(process, 0, stdout, stderr, jail.policy.limits.output).run()
        except FileNotFoundError as error:
            return _say(f"{error.filename}: {error.strerror}", NOT_FOUND)
        except PermissionError as error:
            return _say(f"{error.filename}: {error.strerror}", CANNOT_EXECUTE)
        if report:
            report.write((_json(_record(result)) + "\n").encode())
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
    from .policyfile import files, load, names
    from .unitfile import unit

    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not command or command[0].startswith("-"):
        raise PolicyError("systemd unit: no program was given: nsjail-py systemd unit [OPTIONS] POLICY -- CMD [ARGS...]")
    policy = load(options.policy)
    named = options.policy if options.policy in names() else os.path.abspath(options.policy)
    if "/" in command[0] and not policy.root.startswith("oci:"):  # a unit begins in /, and an image has paths of its own
        command = [os.path.abspath(command[0]), *command[1:]]
    for name, text in unit(policy, named, command, options.name, options.user, options.listen, files(named)).items():
        if options.output:
            (Path(options.output) / name).write_text(text, encoding="utf-8")
            _print(str(Path(options.output) / name))
        else:
            _print(f"# /etc/systemd/system/{name}\n{text}")
    return 0


def apparmor_profile(options: argparse.Namespace) -> int:
    from .apparmor import profile

    _print(profile(options.profile), end="")
    return 0


def selinux_module(options: argparse.Namespace) -> int:
    from .selinux import SAMPLE

    _print(SAMPLE, end="")
    return 0


def policy_list(options: argparse.Namespace) -> int:
    from .policyfile import load, names

    _print("\n".join(f"{name:12} {load(name).description}" for name in names()))
    return 0


def policy_show(options: argparse.Namespace) -> int:
    from .policyfile import load, locate

    path = locate(options.name)
    load(path)  # a file that is no policy is told as one
    _print(path.read_text(encoding="utf-8"), end="")
    return 0


def policy_check(options: argparse.Namespace) -> int:
    from .policyfile import check

    problems = check(options.file)
    _print("\n".join(map(one_line, problems)) if problems else f"{options.file}: good")
    return 1 if problems else 0


def policy_explain(options: argparse.Namespace) -> int:
    from .explain import sentences
    from .policyfile import load

    _print("\n".join(map(one_line, sentences(load(options.name)))))
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
        os.write(2, f"nsjail-py: {one_line(' '.join(text.split()))}\n".encode())
    return status


def _open_standard_streams() -> None:
    """Where the caller closed one, /dev/null takes its number: else a pipe of ours would get it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


ACTS: dict[tuple[str, str], Callable[[argparse.Namespace], int]] = {
    ("run", ""): command_run,
    ("exec", ""): command_exec,
    ("doctor", ""): command_doctor,
    ("selftest", ""): command_selftest,
    ("policy", "list"): policy_list,
    ("policy", "show"): policy_show,
    ("policy", "check"): policy_check,
    ("policy", "explain"): policy_explain,
    ("systemd", "unit"): systemd_unit,
    ("apparmor", ""): apparmor_profile,
    ("selinux", ""): selinux_module,
}


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
        options = parser(arguments[0] if arguments and arguments[0] in COMMANDS else "").parse_args(arguments)
        return ACTS[options.command, getattr(options, "action", "")](options)
    except SystemExit as ended:  # --help
        return int(ended.code or 0)
    except Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except JailError as error:
        from . import systemd

        if systemd.has_journal():
            systemd.journal(error)
        return _say(str(error), SETUP)
    except OSError as error:
        return _say(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), SETUP)
    finally:
        if argv is None:  # the process ends: what is left is to clear away, which takes milliseconds
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
