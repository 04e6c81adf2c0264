"""Run code that nobody trusts in a jail made by the Linux kernel: no Docker, no setuid, three lines of Python.

import nsjail_py
result = nsjail_py.run_python("print(6 * 7)", policy="untrusted", cpu_time=1.0)
result.verdict, result.stdout, result.cpu_time, result.peak_memory
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import JailError, JobError, LauncherDied, PolicyError, RunFailed, ScriptRefused, SetupError, Unavailable
from .jail import DEVNULL, PIPE, STDOUT, Jail, Process, run, run_python
from .policy import Limits, Mount, Policy, Python, Syscalls
from .policyfile import load as policy
from .result import Protection, Result, Verdict

if TYPE_CHECKING:
    from . import aio
    from .executor import JailExecutor

__version__ = "0.1.0"

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
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
    "SetupError",
    "Syscalls",
    "Unavailable",
    "Verdict",
    "aio",
    "policy",
    "run",
    "run_python",
]


def __getattr__(name: str) -> Any:
    """asyncio and the executor are imported when they are asked for: most users start programs."""
    if name == "aio":
        return importlib.import_module(".aio", __name__)
    if name == "JailExecutor":
        from .executor import JailExecutor

        return JailExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
