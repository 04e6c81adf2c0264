"""What this kernel offers, and what this process may do: read and asked once, in about a millisecond, without changing anything."""

from __future__ import annotations

import errno
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from ._native import lib
from .errors import during

CALLS = {
    "clone3": lib.PROBE_CLONE3,
    "close_range": lib.PROBE_CLOSE_RANGE,
    "pidfd_open": lib.PROBE_PIDFD_OPEN,
    "open_tree": lib.PROBE_OPEN_TREE,
    "fsopen": lib.PROBE_FSOPEN,
    "mount_setattr": lib.PROBE_MOUNT_SETATTR,
}
"""System calls without which there is no jail, and how probe.c calls them."""
SINCE = {
    "clone3": "5.3",
    "close_range": "5.11",
    "pidfd_open": "5.3",
    "open_tree": "5.2",
    "fsopen": "5.2",
    "mount_setattr": "5.12",
}
UNIT_SETTINGS = {"clone3": "RestrictNamespaces=no"} | dict.fromkeys(
    ("open_tree", "fsopen", "mount_setattr"), "SystemCallFilter= as `nsjail-py systemd unit` has it"
)
"""What lets each pass that a systemd unit's filter may refuse. systemd.exec(5)"""
ACTIONS = {
    name: getattr(lib, f"PROBE_{name.upper()}")
    for name in ("kill_process", "kill_thread", "trap", "errno", "user_notif", "trace", "log", "allow")
}
"""What a filter can answer, and how probe.c calls it. seccomp(2)"""
NEEDED_ACTIONS = ("kill_process", "errno", "user_notif", "allow")
NEEDED_CAPABILITIES = {"sys_admin": 21, "setuid": 7, "setgid": 6, "setpcap": 8, "chown": 0, "dac_override": 1}
"""What the launcher uses when it is root, by its number in capabilities(7)."""
LANDLOCK = {
    1: "files and directories",
    2: "renaming and linking across directories",
    3: "truncating",
    4: "TCP bind and connect",
    5: "ioctl on devices",
    6: "abstract sockets and signals",
}
"""What each ABI of Landlock added. landlock(7)"""


class Lack(NamedTuple):
    """Something that a jail needs and this host does not give."""

    name: str
    reason: str
    remedy: str


class Host(msgspec.Struct, frozen=True):
    """This host as this process sees it."""

    kernel: tuple[int, int, int]
    release: str
    machine: str
    euid: int
    capabilities: int
    """Effective, as a bit mask."""
    filtered: bool
    """Whether a system call filter is on this process already, as in a container."""
    cpus: int
    """Processors that this process may use."""
    memory: int
    """Bytes."""
    swap: int
    """Bytes; 0: none is switched on; negative: the errno of a filter that keeps it from us."""
    landlock_abi: int
    """0: none."""
    landlock_errata: int
    seccomp_actions: tuple[str, ...]
    notify_size: int
    """Bytes of a user notification of seccomp; negative: the errno of the refusal."""
    calls: tuple[tuple[str, int], ...]
    """Each system call of CALLS with the errno of a senseless call of it."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Privilege modes that may come about here; the control groups decide between the last two."""
        return ("root",) if self.euid == 0 else ("delegated", "rootless")

    def lacks(self) -> list[Lack]:
        """What is missing, without having made a single namespace: doctor.py asks for those."""
        found = [Lack(name, *_explain_call(name, error, self.filtered)) for name, error in self.calls if _is_missing(name, error)]
        if missing := [action for action in NEEDED_ACTIONS if action not in self.seccomp_actions]:
            found.append(Lack("seccomp", f"no {', '.join(missing)}", "a kernel with CONFIG_SECCOMP_FILTER, Linux 5.0 or later"))
        if not self.landlock_abi:
            found.append(Lack("landlock", *landlock_lack()))
        if self.euid == 0:
            dropped = [name for name, bit in NEEDED_CAPABILITIES.items() if not self.capabilities >> bit & 1]
            if dropped:
                names = ", ".join(f"CAP_{name.upper()}" for name in dropped)
                found.append(
                    Lack("capabilities", f"root without {names}", f"give the container or the unit {names}, or run as an ordinary user")
                )
        return found


@functools.lru_cache(maxsize=1)
def probe() -> Host:
    """This host, asked once per process."""
    status = _fields(Path("/proc/self/status"))
    kernel = os.uname()
    version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", kernel.release)
    actions = lib.probe_actions()
    return Host(
        kernel=(int(version[1]), int(version[2]), int(version[3] or 0)) if version else (0, 0, 0),
        release=kernel.release,
        machine=kernel.machine,
        euid=os.geteuid(),
        capabilities=int(status.get("CapEff", "0"), 16),
        filtered=status.get("Seccomp", "0") == "2",
        cpus=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        swap=lib.probe_swap(),
        landlock_abi=max(0, lib.probe_landlock_abi()),
        landlock_errata=lib.probe_landlock_errata(),
        seccomp_actions=tuple(name for name, bit in ACTIONS.items() if actions >> bit & 1),
        notify_size=lib.probe_notify(),
        calls=tuple((name, lib.probe_call(number)) for name, number in CALLS.items()),
    )


def systemd_lack() -> str:
    """Why there are no units here; empty where there are. sd_booted(3)"""
    return "" if Path("/run/systemd/system").is_dir() else "systemd does not run this machine"


def core_helper() -> str:
    """The program that the kernel starts for a core dump, as root and in no jail; empty where it writes files. core(5)"""
    pattern = read(Path("/proc/sys/kernel/core_pattern"))
    return pattern[1:].split(" ")[0] if pattern.startswith("|") else ""


def read(path: Path) -> str:
    """The text of a small file of the kernel; empty where it is not to be had. Raises SetupError where this process has run out of
    something: a lack that passes must not become one of the host's."""
    try:
        with during("host"):
            return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def landlock_lack() -> tuple[str, str]:
    """Why there is no Landlock here, and what to do."""
    if lib.probe_landlock_abi() < 0:
        return "a system call filter refuses it", "a filter that lets landlock_* pass; a systemd unit as `nsjail-py systemd unit` writes it"
    return (
        "this kernel has no Landlock, or it is not switched on",
        "Linux 5.13 or later, started with landlock in its lsm= list (see /sys/kernel/security/lsm)",
    )


def error_text(error: int) -> str:
    """An answer of probe.c in words."""
    return "a system call filter kills whoever asks" if error == lib.PROBE_KILLED else os.strerror(error)


def _fields(path: Path) -> dict[str, str]:
    pairs = (line.partition(":") for line in read(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _is_missing(name: str, error: int) -> bool:
    # Without the right to mount fsopen always answers EPERM. Inside the jail's own namespaces it has that right.
    return error in (errno.ENOSYS, lib.PROBE_KILLED) or (error == errno.EPERM and name != "fsopen")


def _explain_call(name: str, error: int, filtered: bool) -> tuple[str, str]:
    if error in (errno.EPERM, lib.PROBE_KILLED) or filtered:
        unit = f"; in a systemd unit, {UNIT_SETTINGS[name]}" if name in UNIT_SETTINGS else ""
        how = ", which kills whoever calls it" if error == lib.PROBE_KILLED else ""
        return (
            f"{name} is refused by a system call filter{how}",
            f"a container profile that lets it pass, such as docker run --security-opt seccomp=unconfined{unit}",
        )
    return f"{name} is missing", f"Linux {SINCE[name]} or later"
