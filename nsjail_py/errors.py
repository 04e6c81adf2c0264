"""Errors: *we* failed. When the program inside failed, that is a `Result`.

JailError                     everything below
├── PolicyError               a policy, a limit or an argument makes no sense; `problems` lists all of them
├── SetupError                the jail could not be made on this host: step, errno, advice
│   └── Unavailable           the host lacks a protection that the policy requires
├── ScriptRefused             the scan that the policy asks for refused a script; nothing was started
├── LauncherDied              the launcher ended in the middle of a run; the next run starts a new one
├── RunFailed                 raised by Result.check(), and by a JailExecutor's futures: the verdict was not `ok`
├── SessionError              a session has ended, or has no state to go on from
└── JobError                  a function that a JailExecutor ran raised an exception
"""

from __future__ import annotations

import copyreg
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers.scan import Finding
    from .result import Result

SHOWN = 3
CLOSED = "this Jail is closed: make another"


class JailError(Exception):
    """Base class of everything nsjail_py raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        """By text and attributes, since each class is made from something else: so it comes back from another process."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class PolicyError(JailError, ValueError):
    """A policy, a limit or an argument makes no sense. `problems` holds one line for each fault found."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class SetupError(JailError):
    """The jail could not be made. `step` names what failed, `errno` is the kernel's answer, `advice` what to do."""

    began = False
    """Whether the program may have run all the same, or what it was to read has been taken from a file."""

    def __init__(self, step: str, errno: int = 0, detail: str = "", advice: str = "") -> None:
        said = f"{step}: {os.strerror(errno)}" if errno else step
        super().__init__("; ".join(part for part in (f"{said}{f' ({detail})' if detail else ''}", advice) if part))
        self.step, self.errno, self.detail, self.advice = step, errno, detail, advice


def passes(error: OSError) -> bool:
    """Whether the system has run out of something, which says nothing about what was looked at."""
    from .advice import SCARCE

    return error.errno in SCARCE


def during(step: str) -> _During:
    """What the system has run out of is a SetupError of this step; any other error stays what it is."""
    return _During(step)


class _During:
    __slots__ = ("_step",)

    def __init__(self, step: str) -> None:
        self._step = step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, OSError) or not passes(error):
            return
        from .advice import SCARCE

        raise SetupError(self._step, error.errno or 0, str(error.filename or ""), SCARCE[error.errno or 0]) from None


class Unavailable(SetupError):
    """This host cannot give a protection that the policy requires."""


class ScriptRefused(JailError):
    """The policy says `scan = "refuse"`, and the scan found something in the script, or could not scan it. Nothing was started."""

    def __init__(self, filename: str, findings: Sequence[Finding], reason: str = "") -> None:
        places = [f"{filename}:{one}" for one in findings[:SHOWN]]
        more = [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
        super().__init__(f"refused by the scan: {reason or '; '.join(places + more)}")
        self.findings = tuple(findings)


class LauncherDied(JailError):
    """The launcher ended in the middle of a run. The jail is gone with it; the next run starts a new launcher."""


class JobError(JailError):
    """A function that ran in a jail raised an exception. `type` is the name of its class, `message` its text, `traceback` what Python
    printed inside: text, all three, and written by the job."""

    def __init__(self, type: str, message: str, traceback: str) -> None:
        super().__init__(f"{type}: {message}\n\n{traceback}".rstrip())
        self.type, self.message, self.traceback = type, message, traceback


class SessionError(JailError):
    """A session has ended, or has no state to go on from; the text says why."""


class RunFailed(JailError):
    """`Result.check()` found another verdict than `ok`; the whole record is in `result`."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.summary)
        self.result = result
