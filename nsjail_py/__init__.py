"""Run code that nobody trusts in a jail made by the Linux kernel: no Docker, no setuid, three lines of Python.

import nsjail_py
result = nsjail_py.run_python("print(6 * 7)", policy="untrusted", cpu_time=1.0)
result.verdict, result.stdout, result.cpu_time, result.peak_memory
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import JailError, JobError, LauncherDied, PolicyError, RunFailed, ScriptRefused, SessionError, SetupError, Unavailable
from .jail import DEVNULL, PIPE, STDOUT, Jail, Process, run, run_python
from .policy import Limits, Mount, Policy, Python, Syscalls
from .policyfile import load as policy
from .result import Protection, Result, Verdict

__version__ = "0.1.0"

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Cell",
    "Jail",
    "JailError",
    "JailExecutor",
    "JobError",
    "LauncherDied",
    "Limits",
    "Mount",
    "Policy",
    "PolicyError",
    "Process",
    "Protection",
    "Python",
    "Result",
    "RunFailed",
    "ScriptRefused",
    "Session",
    "SessionError",
    "SetupError",
    "Syscalls",
    "Unavailable",
    "Verdict",
    "aio",
    "policy",
    "run",
    "run_python",
]

LATE = {"Cell": "session", "JailExecutor": "executor", "Session": "session", "aio": "aio"}
"""By their modules: what is imported when it is asked for, since most users start programs."""

if TYPE_CHECKING:  # a type checker that saw the function would take any name for one of ours
    from . import aio
    from .executor import JailExecutor
    from .session import Cell, Session
else:

    def __getattr__(name: str) -> Any:
        if name not in LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{LATE[name]}", __name__)
        return module if name == LATE[name] else getattr(module, name)
