"""`nsjail-py systemd unit`: a unit that runs one program in a jail, hardened from systemd's side too, with a comment on each line.

Every setting below was run with a jail inside. What would be nice and cannot be had is named where it would stand. systemd.exec(5),
systemd.resource-control(5), systemd.socket(5)
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import PolicyError
from .rootfs import is_below

if TYPE_CHECKING:
    from .policy import Policy

OVERHEAD = 128 * 1024**2
"""Memory of nsjail-py itself and its launcher."""
TASKS = 16
"""Their processes and threads."""
PROCESSORS = 1
"""What they may keep busy. Were it nothing, a program that uses up its share would leave none to the clocks that end it."""
LONGEST = 107
"""Bytes of a socket's path."""
ROOT = ("root", "0")
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")
SET_UP = 35
"""Seconds that a run may take before its own clock begins."""
CAPABILITIES = "CAP_SYS_ADMIN CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_CHOWN CAP_DAC_OVERRIDE CAP_SYS_CHROOT CAP_KILL CAP_NET_ADMIN"

CALLS = "@mount sethostname seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"""What making a jail takes beyond @system-service. The group @sandbox is unknown to systemd 252."""


class Line(NamedTuple):
    """One setting, and why it is there."""

    setting: str
    why: str


def unit(
    policy: Policy,
    named: str,
    command: Sequence[str],
    name: str,
    user: str = "",
    listen: str = "",
    read_from: Iterable[Path] = (),
) -> dict[str, str]:
    """The files by their names. named: the policy as nsjail-py is told it. listen: an address; then there is a socket, and each connection
    is one run, with the connection as its standard input and output. read_from: the policy's files, where it has some. Raises PolicyError
    for what no unit can hold."""
    if not re.fullmatch(r"[A-Za-z0-9:_.\\-]+", name):
        raise PolicyError(f"name {name!r}: letters, digits and :-_.\\ only")
    if user and not _is_user(user):
        raise PolicyError(f"user {user!r}: letters, digits and -_.@ only, or the number of one")
    if listen and not _is_address(listen):
        path = f"a path of at most {LONGEST} bytes without blanks, backslashes and '..'"
        raise PolicyError(f"listen {listen!r}: {path}, PORT, or HOST:PORT with the number of the host")
    if re.search(r"[\\\"']", sys.executable):
        raise PolicyError(f"the interpreter {sys.executable!r}: systemd starts no program with a quote or backslash in its path")
    head = Line(f"Description=A jail: {_plain(command[0])}", "what systemctl shows")
    needed = _needed(policy, [named, *map(str, read_from)], command[0])
    service = [*_start(named, command, listen), *_identity("" if user in ROOT else user), *_limits(policy), *_walls(policy, needed)]
    if not listen:
        return {f"{name}.service": _text(Unit=[head], Service=service, Install=[START])}
    return {
        f"{name}@.service": _text(Unit=[head, COLLECT], Service=service),
        f"{name}.socket": _text(Unit=[head], Socket=_socket(listen), Install=[LISTEN]),
    }


WALLS = (
    Line("NoNewPrivileges=yes", "no program gains rights by being executed"),
    Line("ProtectSystem=strict", "nsjail-py itself can write to its own directories only"),
    Line("PrivateDevices=yes", "no hardware"),
    Line("ProtectKernelModules=yes", "no modules"),
    Line("ProtectClock=yes", "the clock stays"),
    Line("LockPersonality=yes", "no other execution domain"),
    Line("RestrictRealtime=yes", "no realtime scheduling"),
    Line("RestrictSUIDSGID=yes", "no set-user-id files"),
    Line("RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK", "sockets of these kinds only"),
    Line("SystemCallArchitectures=native", "no system calls of a foreign architecture"),
    Line(f"SystemCallFilter=@system-service {CALLS}", "systemd's set for services, and what makes a jail"),
    Line("SystemCallErrorNumber=EPERM", "a refused call is an error, and no death"),
    Line("UMask=0077", "what it writes is its own"),
)


START = Line("WantedBy=multi-user.target", "start it with the machine")
COLLECT = Line("CollectMode=inactive-or-failed", "each connection is a unit of its own: one that failed must not stay until reset-failed")
LISTEN = Line("WantedBy=sockets.target", "listen from the start of the machine on")


def _is_user(user: str) -> bool:
    """A number is none with a zero before it, nor if it stands for no user. systemd.exec(5), user_namespaces(7)"""
    if re.fullmatch("[0-9]+", user):
        return re.fullmatch("0|[1-9][0-9]{0,9}", user) is not None and int(user) < 2**32 - 1 and int(user) != 2**16 - 1
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*", user) is not None


def _is_address(listen: str) -> bool:
    """systemd looks no names up. systemd.socket(5), unix(7)"""
    if listen.startswith(("/", "@")):
        fits = len(listen.encode(errors="surrogatepass")) <= LONGEST
        return fits and re.fullmatch(r"[/@][^\s\\]+", listen) is not None and ".." not in listen.split("/")
    host, colon, port = listen.rpartition(":")
    try:
        if colon:
            ipaddress.IPv6Address(host[1:-1]) if host[:1] + host[-1:] == "[]" else ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return re.fullmatch("[1-9][0-9]{0,4}", port) is not None and int(port) < 2**16 and "%" not in host


def _text(**sections: Sequence[Line]) -> str:
    """Comments have lines of their own: behind a setting they would be part of it. systemd ends lines in more ways than one."""
    for setting, _ in (line for lines in sections.values() for line in lines):
        for letter in setting:
            if unicodedata.category(letter) in ("Cc", "Cs") and letter != "\t":
                raise PolicyError(f"{setting.partition('=')[0]}= of a unit cannot hold {letter!a}: no control character, and UTF-8 only")
    return "\n".join(f"[{title}]\n" + "".join(f"# {why}\n{setting}\n" for setting, why in lines) for title, lines in sections.items())


def _socket(listen: str) -> list[Line]:
    return [
        Line(f"ListenStream={listen.replace('%', '%%')}", "where connections are taken: a path, or HOST:PORT"),
        Line("Accept=yes", "one connection, one run, one jail"),
        Line("MaxConnections=16", "runs at one time"),
        Line("SocketMode=0600", "only root may connect to a path; give it a SocketGroup= and 0660 to share it"),
    ]


def _start(named: str, command: Sequence[str], listen: str) -> list[Line]:
    words = [f":{sys.executable}", "-m", "nsjail_py", "exec", "--policy", named, "--", *command]
    start = " ".join(map(quoted, words))
    lines = [
        Line("Type=exec", "started when nsjail-py itself is started"),
        Line(f"ExecStart={start}", "the jail; the exit status is the program's own, 124 a limit, 125 a failed set-up"),
        Line("SuccessExitStatus=143", "that of nsjail-py at SIGTERM: who is told to stop and does has not failed"),
    ]
    if listen:
        lines += [Line("StandardInput=socket", "the connection is what the program reads"), Line("StandardOutput=socket", "and writes")]
    return [*lines, Line("StandardError=journal", "its errors, and one entry for the run: journalctl NSJAIL_VERDICT=memory")]


def _identity(user: str) -> list[Line]:
    if user:
        return [
            Line(f"User={user}", "not root: runs have this user's id on the host"),
            Line(f"CacheDirectory=nsjail_py-{user}", "roots and filters, kept between runs; root's is another"),
            Line("CapabilityBoundingSet=", "no right at all on the host: those in the jail's own user namespace are enough"),
        ]
    return [
        Line(f"CapabilityBoundingSet={CAPABILITIES}", "root, with just what making a jail takes; each run has a host user id of its own"),
        Line("CacheDirectory=nsjail_py", "roots and filters, kept between runs"),
        Line("ProtectKernelLogs=yes", "no kernel log (it covers a part of /proc: an ordinary user could not mount a jail's own then)"),
        Line("RuntimeDirectory=nsjail_py", "/run/nsjail_py: which host user ids are in use"),
        Line("RuntimeDirectoryPreserve=yes", "other services of nsjail_py have their locks there, too"),
    ]


def _limits(policy: Policy) -> list[Line]:
    limits = policy.limits
    lines = [Line("Delegate=yes", "the control group is ours to divide: the jail's limits are set in it")]
    if limits.memory is not None:
        lines.append(Line(f"MemoryMax={limits.memory + OVERHEAD}", "the policy's memory, and nsjail-py's own"))
        lines.append(Line("MemorySwapMax=0", "swap is memory"))
    if limits.processes is not None:
        lines.append(Line(f"TasksMax={limits.processes + TASKS}", "the policy's processes, and nsjail-py's own"))
    if limits.cpus is not None:
        quota = math.ceil(100 * (limits.cpus + PROCESSORS))
        lines.append(Line(f"CPUQuota={quota}%", "the policy's cpus, and nsjail-py's own: it must be awake to end the jail"))
    if limits.cpuset is not None:
        lines.append(Line(f"AllowedCPUs={limits.cpuset}", "the policy's cpuset, where nsjail-py has its turn as everybody"))
    if limits.wall_time is not None:
        lines.append(Line(f"RuntimeMaxSec={limits.wall_time + SET_UP:.0f}", "the policy's wall_time, and the making of the jail"))
    lines.append(Line("TimeoutStopSec=5", "the jail is gone at once; nsjail-py needs no longer"))
    lines.append(Line("KillMode=mixed", "SIGTERM to nsjail-py, which ends the jail; what is left after that is killed"))
    return lines


def _needed(policy: Policy, files: Sequence[str], program: str) -> list[str]:
    """The paths of the host without which there is no run. Names are among them, which are no paths."""
    shown = ["/" if policy.root == "host" else policy.root.removeprefix("oci:"), policy.workdir or "", policy.python.project or ""]
    shown += [mount.source for mount in policy.mounts]
    return [*files, program, *shown, policy.backend.removeprefix("oci:"), __file__, sys.prefix, sys.base_prefix]


def _meet(paths: Iterable[str], places: Iterable[str]) -> bool:
    """Whether one of the paths lies in one of the places, or has one in it."""
    return any(is_below(way, place) or is_below(place, way) for way in _ways(paths) for place in _ways(places))


def _ways(paths: Iterable[str]) -> set[str]:
    """Each path as it is written, and where it leads."""
    return {way for path in paths if path.startswith("/") for way in (os.path.normpath(path), _real(path))}


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # no path can be so, and no line of a unit: _text says it
        return path


def _walls(policy: Policy, needed: Sequence[str]) -> list[Line]:
    lines = list(WALLS)
    if not _meet(needed, HOMES):
        lines.append(Line("ProtectHome=yes", "homes are not there"))
    if not _meet(needed, TEMPORARY):
        lines.append(Line("PrivateTmp=yes", "a /tmp of its own"))
    if "net" in policy.namespaces:
        lines.append(Line("PrivateNetwork=yes", "no network for nsjail-py either"))
    lines += [
        Line(f"ReadWritePaths={quoted(mount.source)}", "what the policy lets be written") for mount in policy.mounts if mount.writable
    ]
    if policy.workdir:
        lines.append(Line(f"ReadWritePaths={quoted(policy.workdir)}", "the policy's work directory"))
    return lines


def quoted(word: str) -> str:
    """A word of a setting: no specifier and no escape in it is any. Variables are expanded in ExecStart= alone, and not behind a colon."""
    text = word.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return text if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text) else f'"{text}"'


def _plain(word: str) -> str:
    """In words that systemd does not unquote; a backslash at the end of a line would go on in the next."""
    return word.replace("%", "%%").replace("\\", "\\\\")
