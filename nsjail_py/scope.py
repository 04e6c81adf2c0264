"""A control group for our launcher, asked of the user's systemd: a transient scope with Delegate=yes, which goes when the launcher goes.

busctl(1) is where systemd is, and asks nobody for a password here: a user's manager serves its user. org.freedesktop.systemd1(5)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from . import hostinfo
from .errors import during

SECONDS = 5.0
"""That the manager may take to answer, and to move the process."""
PAUSE = 0.002
PATH = "/usr/bin:/bin"
LINGER = "log in, or loginctl enable-linger USER"
BY_HAND = "have root make a group of your own, with its cgroup.procs and cgroup.subtree_control, and start you in it"
SEE = "see journalctl --user"


class RefusedError(Exception):
    """There is no scope: why, and what to do."""


def delegates(unit: str) -> bool:
    """Whether the user's manager has handed over the group of this unit of its own. It leaves no mark, as the system's manager does."""
    program = shutil.which("systemctl", path=PATH)
    command = [program or "", "--user", "show", "--property=Delegate", "--value", "--", unit]
    return program is not None and _answer(command, {"XDG_RUNTIME_DIR": f"/run/user/{os.geteuid()}"}) == (0, "yes")


def ask(pid: int) -> None:
    """Has the process moved into a scope of its own. Raises RefusedError."""
    bus = Path(f"/run/user/{os.geteuid()}/bus")
    program = shutil.which("busctl", path=PATH)
    if not bus.exists():
        lack = hostinfo.systemd_lack()
        raise RefusedError(lack, BY_HAND) if lack else RefusedError(f"no user manager can be asked for one ({bus} is not there)", LINGER)
    if program is None:
        raise RefusedError("busctl, which asks for one, is not here", "install systemd's own tools")
    name = f"nsjail_py-{pid}-{time.monotonic_ns()}.scope"
    properties = ["Description", "s", f"Jails of process {os.getpid()}", "Delegate", "b", "true", "PIDs", "au", "1", str(pid)]
    properties += ["CollectMode", "s", "inactive-or-failed"]
    manager = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]
    call = ["StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", "4", *properties, "0"]
    options = [f"--address=unix:path={bus}", "--quiet", f"--timeout={SECONDS:.0f}", "--allow-interactive-authorization=no"]
    status, said = _answer([program, *options, "call", *manager, *call], {})
    if status:
        raise RefusedError(f"the user manager refuses one: {said}", SEE)
    _wait(pid, name)


def _answer(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """A program's status and words. Raises SetupError where no descriptor, memory or process is left for it: that is no answer."""
    try:
        # One that subprocess opens itself is lost in Python 3.11.2 when there is none left for a pipe behind it.
        with during("launcher"), open(os.devnull, "rb") as null:
            done = subprocess.run(
                command,
                stdin=null,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # one pipe, for the same reason
                encoding="utf-8",
                errors="replace",
                env={"PATH": PATH, "LANG": "C", **environment},
                timeout=2 * SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {2 * SECONDS:.0f} s"
    except OSError as error:
        return 1, f"no answer: {error}"
    return done.returncode, " ".join(done.stdout.split())


def _wait(pid: int, name: str) -> None:
    """The call returns when the job is queued."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if name in Path(f"/proc/{pid}/cgroup").read_text():
            return
        time.sleep(PAUSE)
    raise RefusedError(f"the user manager did not move the launcher within {SECONDS:.0f} s", SEE)
