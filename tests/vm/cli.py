"""`./dev vm`, `vm-test`, `vm-smoke` and `vm-box`. 125: there was no machine, or no status from it; one line says why."""

from __future__ import annotations

import argparse
import signal
import sys
import types
from pathlib import Path

import box
import hosts
import images
import machine
from images import TroubleError
from machine import Machine

TROUBLE = 125
DEFAULT_KERNELS = {"debian12": "6.1", "debian13": "6.12", "debian13-selinux": "6.12", "debian-testing": "testing"}


def _vm(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    outcome = machine.run(_machine(arguments), arguments.user, command or ["uname", "-a"], sys.stdout.buffer, arguments.timeout)
    return outcome.status


def _test(arguments: argparse.Namespace) -> int:
    words = arguments.pytest[1:] if arguments.pytest[:1] == ["--"] else arguments.pytest
    chosen = [Machine(*each) for each in DEFAULT_KERNELS.items() if arguments.distro in (None, each[0])]
    if arguments.kernel:
        chosen = [Machine(arguments.distro or "debian12", arguments.kernel)]
    users = [arguments.user] if arguments.user else machine.USERS
    statuses = [_suite(each, user, words, arguments.timeout) for each in chosen for user in users]
    return TROUBLE if TROUBLE in statuses else max(statuses)


def _suite(which: Machine, user: machine.User, words: list[str], seconds: float) -> int:
    """One that hangs is no reason to leave out the others."""
    try:
        return hosts.suite(which, user, words, seconds)
    except TroubleError as error:
        images.say(f"{which.distro}, kernel {which.kernel}, {user}: {error}")
        return TROUBLE


def _smoke(arguments: argparse.Namespace) -> int:
    return hosts.smoke(_machine(arguments), arguments.timeout)


def _box(arguments: argparse.Namespace) -> int:
    return box.make(_machine(arguments), arguments.file)


def _machine(arguments: argparse.Namespace) -> Machine:
    return Machine(arguments.distro, arguments.kernel or DEFAULT_KERNELS[arguments.distro])


def _which(distro: str | None = "debian12") -> argparse.ArgumentParser:
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--distro", choices=images.DISTROS, default=distro)
    which.add_argument("--kernel", choices=images.KERNELS, help="default: the distribution's own")
    which.add_argument("--timeout", type=float, default=3 * 3600, metavar="SECONDS", help="for the command, without the boot")
    return which


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="./dev", description=__doc__)
    commands = top.add_subparsers(required=True)
    vm = commands.add_parser("vm", parents=[_which()], help="run a command in a test machine, with a copy of this checkout in /src")
    vm.add_argument(
        "--user", choices=machine.USERS, default="root", help="root in a delegated unit, or a user with or without such a group"
    )
    vm.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="without one: uname -a. There is no terminal")
    vm.set_defaults(do=_vm)

    test = commands.add_parser(
        "vm-test", parents=[_which(None)], help="the suite in each machine and mode; a whole one is noted in docs/hosts.md"
    )
    test.add_argument("--user", choices=machine.USERS, help="default: all of them")
    test.add_argument("pytest", nargs=argparse.REMAINDER, metavar="-- PYTEST ARGUMENTS")
    test.set_defaults(do=_test)

    smoke = commands.add_parser("vm-smoke", parents=[_which()], help="runs and control groups, as root and as a user, in one boot")
    smoke.set_defaults(do=_smoke)

    make = commands.add_parser("vm-box", parents=[_which()], help="a machine as a box for Vagrant")
    make.add_argument("file", type=Path)
    make.set_defaults(do=_box)
    return top


def _leave(number: int, frame: types.FrameType | None) -> None:
    sys.exit(128 + number)  # what is being built or run is cleared away on the way out


def main(words: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    arguments = parser().parse_args(words)
    try:
        return int(arguments.do(arguments))
    except TroubleError as error:
        images.say(str(error))
    except OSError as error:
        images.say(f"{error.filename or 'this machine'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return TROUBLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
