"""What one run came to: the launcher's report, turned into a verdict with its evidence.

A `Result` is about the program. When *we* failed there is none: an exception of errors.py says which step and why.
"""

from __future__ import annotations

import enum
import errno
import signal as signals
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct, structs, to_builtins

from .errors import JailError, RunFailed

if TYPE_CHECKING:
    from .layers.audit import Audit
    from .layers.posture import Posture
    from .policy import Policy


class Verdict(enum.StrEnum):
    """How a run ended. The set is closed: `ok` is an exit with 0, `exit` one with another status, `is_limit` those by a limit."""

    ok = "ok"
    exit = "exit"
    signal = "signal"
    cpu_time = "cpu_time"
    wall_time = "wall_time"
    idle = "idle"
    memory = "memory"
    processes = "processes"
    output = "output"
    disk = "disk"
    syscall = "syscall"
    exec_failed = "exec_failed"
    killed = "killed"

    @property
    def is_limit(self) -> bool:
        """Whether a limit of the policy ended the run."""
        return self in LIMITS


FURTHER_CALLS = "further calls"
"""Stands in `Result.denied` for those that the report has no place for."""
LIMITS = frozenset(
    {Verdict.cpu_time, Verdict.wall_time, Verdict.idle, Verdict.memory, Verdict.processes, Verdict.output, Verdict.disk, Verdict.syscall}
)

SENTENCES: dict[Verdict, str] = {
    Verdict.ok: "exited with 0",
    Verdict.exit: "exited with {exit_code}",
    Verdict.signal: "ended by {signal_name}",
    Verdict.cpu_time: "used {observed:.3f} s of processor time, limit {limit:.3f} s",
    Verdict.wall_time: "ran for {observed:.3f} s, limit {limit:.3f} s",
    Verdict.idle: "did nothing for {observed:.3f} s, limit {limit:.3f} s",
    Verdict.memory: "ran out of memory, limit {limit} bytes",
    Verdict.processes: "was refused more processes or threads, limit {limit}",
    Verdict.output: "wrote more than {limit} bytes",
    Verdict.disk: "filled its disk space, limit {limit} bytes",
    Verdict.syscall: "made a denied system call: {syscall}",
    Verdict.exec_failed: "could not be executed: {error}{named}",
    Verdict.killed: "was killed by the caller",
}


class Protection(Struct, frozen=True):
    """One protection of the policy, and what became of it in this run."""

    name: str
    state: Literal["applied", "unavailable", "not requested"]
    reason: str = ""


class Result(Struct, frozen=True):
    """The record of one run. Times are seconds, sizes bytes; `None` is unknown."""

    verdict: Verdict
    evidence: dict[str, Any]
    """What the verdict rests on: the limit and what was observed, the signal, the system call, the error. `outside` names what ran out
    around the jail, `memory` or `processes`: the host's, or by a limit of a control group above, which is no limit of the policy."""
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_cut: bool
    """Whether more was written than is kept here."""
    stderr_cut: bool
    wall_time: float
    user_time: float
    system_time: float
    cpu_time: float
    """User and system time of all processes together, from exec on: what making the jail took is not in it."""
    cpu_source: str
    """Who counted: `cgroup2`, `cgroup1`, or `rusage` (only processes that were waited for). `unavailable`: nobody, and the times are 0."""
    peak_memory: int
    memory_source: str
    """Who counted: `cgroup2`, `cgroup1` (everything together), or `rusage` (the largest process). `unavailable`: nobody; the peak is 0."""
    peak_processes: int | None
    oom_events: int
    denied: dict[str, int]
    """Denied system calls by name, with how often each was tried; `further calls`: all beyond the first 48 different ones."""
    setup_time: float
    """Seconds from the request to the start of the program."""
    timeline: dict[str, float]
    """Where the time went, in microseconds, one step after the other: `request` until the launcher had it, `cell` until the program
    ran, `run`, `clear` until all of it was counted, `report` until it was heard here."""
    mode: str
    """`root`, `delegated` or `rootless`."""
    policy: str
    protections: tuple[Protection, ...] = ()
    settled: Policy | None = None
    """The whole policy that it ran under."""
    audit: Audit | None = None
    """What the interpreter itself told, where the policy asks (`[python] audit`): its word, and so the program's."""

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name not in ("protections", "settled", "audit"))
        return f"Result({', '.join(shown)})"

    @property
    def ok(self) -> bool:
        return self.verdict is Verdict.ok

    @property
    def posture(self) -> Posture | None:
        """For which code the policy of this run is fit on this host, and what is left (`nsjail-py posture`), judged when asked for."""
        if self.settled is None:
            return None
        from .layers.posture import of_policy

        return of_policy(self.settled)

    @property
    def _judged(self) -> dict[str, Any] | None:
        """The posture by reference. None where there is no launcher any more to say what the host gives."""
        try:
            found = self.posture
        except JailError:
            return None
        return None if found is None else {"policy": found.policy, "level": found.level, "exposure": found.exposure}

    @property
    def summary(self) -> str:
        """One line that says how the run ended."""
        name = signals.Signals(self.signal).name if self.signal in set(signals.Signals) else f"signal {self.signal}"
        or_else = ", or the interpreter that it names" if self.evidence.get("errno") == errno.ENOENT else ""
        named = f" ({self.evidence['program']}{or_else})" if "program" in self.evidence else ""
        facts = {"exit_code": self.exit_code, "signal_name": name, "named": named, **self.evidence}
        outside = f", and {self.evidence['outside']} ran out around the jail, not by its policy" if "outside" in self.evidence else ""
        return f"{self.verdict}: the program {SENTENCES[self.verdict].format(**facts)}{outside}"

    def check(self) -> Result:
        """This result, if the verdict is `ok`. Raises RunFailed otherwise, as subprocess.CompletedProcess.check_returncode does."""
        if not self.ok:
            raise RunFailed(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; of the posture, its level. Output that is no UTF-8 is base64: `stdout_encoding` says which it is."""
        record: dict[str, Any] = to_builtins(structs.replace(self, settled=None), builtin_types=(bytes,))
        del record["settled"]
        record["posture"] = self._judged
        for name in ("stdout", "stderr"):
            record[name], record[f"{name}_encoding"] = as_text(getattr(self, name))
        return record


def as_text(data: bytes) -> tuple[str, str]:
    """The bytes as text and `utf-8`, or where they are not that, in base64."""
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        import base64

        return base64.b64encode(data).decode(), "base64"
