"""The label of a security module that a policy wants for its program: AppArmor's profile, SELinux's context."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .hostinfo import read

if TYPE_CHECKING:
    from .policy import Policy

APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
SELINUX = Path("/sys/fs/selinux/enforce")


class Label(NamedTuple):
    """Three strings of the plan."""

    written: str
    file: str
    """Below /proc, where it is written before exec."""
    shown: str
    """Below /proc/PID, where the kernel shows what became of it."""


NONE = Label("", "", "")


def decide(policy: Policy) -> Label:
    """NONE where none is asked for, or where it cannot be had and the policy does without."""
    if policy.apparmor is not None and not lacks()["apparmor"]:
        return Label(f"exec {policy.apparmor}", "thread-self/attr/apparmor/exec", "attr/apparmor/current")
    if policy.selinux is not None and not lacks()["selinux"]:
        return Label(policy.selinux, "thread-self/attr/exec", "attr/current")
    return NONE


@functools.lru_cache(maxsize=1)
def lacks() -> dict[str, str]:
    """Why each of them cannot be had here; empty where it can."""
    enforcing = read(SELINUX)
    return {
        "apparmor": "" if read(APPARMOR) == "Y" else "AppArmor is not switched on in this kernel",
        "selinux": "" if enforcing == "1" else "SELinux is permissive" if enforcing else "SELinux is not switched on in this kernel",
    }
