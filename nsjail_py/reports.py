"""The launcher's report, read: a verdict with its evidence, or the exception that says why there was no run."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

from ._native import ffi, lib
from .errors import SetupError
from .result import FURTHER_CALLS, Protection, Result, Verdict

if TYPE_CHECKING:
    from .policy import Policy
    from .rootfs import MountStep

SOURCES = {lib.SOURCE_NONE: "none", lib.SOURCE_RUSAGE: "rusage", lib.SOURCE_CGROUP1: "cgroup1", lib.SOURCE_CGROUP2: "cgroup2"}
STEP_NAMES = {number: name.removeprefix("STEP_").lower().replace("_", " ") for number, name in ffi.typeof("enum step").elements.items()}
MAX_ERRNO = 4095
MOUNT_STEPS = ("mount target", "mount source", "mount bind", "mount idmap", "mount scratch", "mount proc", "mount devpts", "mount mask")


class Context(NamedTuple):
    """What a report is read against."""

    policy: Policy
    mode: str
    mounts: tuple[MountStep, ...]
    protections: tuple[Protection, ...]
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_cut: bool = False
    stderr_cut: bool = False
    file_cut: bool = False
    """A file that was carried for the program had no room for all that it wrote."""
    program: str = ""
    begin_ns: int = 0
    """When the start was asked for, and when the end was heard of; CLOCK_MONOTONIC."""
    heard_ns: int = 0


def parse(message: bytes) -> Any:
    """A `struct report`. A message of another size, or with numbers that are none of ours, is an error."""
    report = ffi.new("struct report *")
    if len(message) != ffi.sizeof("struct report"):
        raise SetupError("report", detail=f"{len(message)} bytes where {ffi.sizeof('struct report')} were expected")
    ffi.buffer(report)[:] = message
    sound = report.step in STEP_NAMES and report.error <= MAX_ERRNO and report.denied_count <= lib.MAX_DENIED
    if not sound or report.cpu_source not in SOURCES or report.memory_source not in SOURCES:
        raise SetupError("report", detail="it makes no sense")
    return report


def to_result(report: Any, context: Context) -> Result:
    """The result of a run that took place. Raises SetupError where none did."""
    step = "label" if refused_label(report, context) else STEP_NAMES[report.step]
    if report.kind == lib.REPORT_FAILED and step != "exec":
        raise setup_error(step, report, context)
    if report.cause == lib.CAUSE_NONE and (context.stdout_cut or context.stderr_cut):
        report.cause = lib.CAUSE_OUTPUT  # it ended by itself before it could be ended
    verdict, evidence = judge(report, context, denied := denied_names(report))
    return Result(
        verdict=verdict,
        evidence=evidence,
        exit_code=report.exit_code if report.exit_code >= 0 else None,
        signal=report.signal if report.signal >= 0 else None,
        stdout=context.stdout,
        stderr=context.stderr,
        stdout_cut=context.stdout_cut,
        stderr_cut=context.stderr_cut,
        wall_time=report.wall_ns / 1e9,
        user_time=report.user_ns / 1e9,
        system_time=report.system_ns / 1e9,
        cpu_time=report.cpu_ns / 1e9,
        cpu_source=SOURCES[report.cpu_source],
        peak_memory=report.peak_memory,
        memory_source=SOURCES[report.memory_source],
        peak_processes=report.peak_processes or None,
        oom_events=report.oom_kills,
        denied=denied,
        setup_time=report.setup_ns / 1e9,
        timeline=timeline(report, context),
        mode=context.mode,
        policy=context.policy.name,
        settled=context.policy,
        protections=protections(report, context),
    )


def timeline(report: Any, context: Context) -> dict[str, float]:
    executed = report.request_ns + report.setup_ns
    ended = report.end_ns or report.answer_ns  # 0: it was killed from outside, and nobody saw when
    moments = [context.begin_ns, report.request_ns, executed, ended, report.answer_ns, context.heard_ns]
    return {name: (moments[n + 1] - moments[n]) / 1e3 for n, name in enumerate(("request", "cell", "run", "clear", "report"))}


def protections(report: Any, context: Context) -> tuple[Protection, ...]:
    """With what only the run itself could find out."""
    if not report.flags & lib.REPORT_NO_NESTED:
        return context.protections
    nested = Protection(
        "nested_userns",
        "unavailable",
        "/proc/sys/user cannot be written here, where user namespaces within are forbidden and inotify is limited",
    )
    return tuple(nested if one.name == nested.name and one.state == "applied" else one for one in context.protections)


def refused_label(report: Any, context: Context) -> bool:
    """Whether exec was refused for the sake of a label. It comes with exec, and so does the security module's no; that the program may be
    executed at all was seen before."""
    if STEP_NAMES[report.step] != "exec" or report.error not in (errno.EACCES, errno.EPERM):
        return False
    return any(one.name in ("apparmor", "selinux") and one.state == "applied" for one in context.protections)


def setup_error(step: str, report: Any, context: Context) -> SetupError:
    from .advice import advice

    detail = ""
    if step in MOUNT_STEPS and report.detail < len(context.mounts):
        mount = context.mounts[report.detail]
        detail = f"{mount.source} on {mount.target}" if mount.source else mount.target
    error = SetupError(step, report.error, detail, advice(step, report.error))
    error.began = bool(report.flags & lib.REPORT_BEGAN)
    return error


def denied_names(report: Any) -> dict[str, int]:
    if not report.denied_count:
        return {}
    from .syscalls import name_of

    named = {name_of(denied.nr): denied.count for denied in report.denied[0 : report.denied_count]}
    return named | {FURTHER_CALLS: report.denied_more} if report.denied_more else named


def judge(report: Any, context: Context, denied: dict[str, int]) -> tuple[Verdict, dict[str, Any]]:
    """The verdict, most telling cause first: what the launcher ended, what the kernel ended, what the program itself said."""
    policy = context.policy
    limits = policy.limits
    clocks = {
        lib.CAUSE_WALL: (Verdict.wall_time, limits.wall_time),
        lib.CAUSE_CPU: (Verdict.cpu_time, limits.cpu_time),
        lib.CAUSE_IDLE: (Verdict.idle, limits.idle_time),
    }
    failed = report.exit_code != 0
    outside = met_outside(report) if failed else {}
    if report.kind == lib.REPORT_FAILED:
        evidence = {"errno": report.error, "error": os.strerror(report.error), "program": context.program, **outside}
        return (Verdict.memory, {"limit": limits.memory, **evidence}) if report.oom_kills else (Verdict.exec_failed, evidence)
    if report.cause in clocks:
        verdict, limit = clocks[report.cause]
        return verdict, {"limit": limit, "observed": report.observed / 1e9}
    if report.cause == lib.CAUSE_MEMORY:
        return Verdict.memory, {"limit": limits.memory, "observed": report.observed}
    if report.cause == lib.CAUSE_OUTPUT:
        return Verdict.output, {"limit": limits.output}
    if report.cause == lib.CAUSE_SYSCALL:
        return Verdict.syscall, {"syscall": ", ".join(denied)}
    if report.cause == lib.CAUSE_CALLER:
        return Verdict.killed, {}
    if report.oom_kills:
        return Verdict.memory, {"limit": limits.memory, "observed": report.peak_memory, "oom_kills": report.oom_kills}
    # Of these two the kernel leaves no other trace than the signal. A program that sends it to itself gets what it asked for.
    if report.signal == signal.SIGSYS and policy.syscalls is not None:
        return Verdict.syscall, {"syscall": "of a foreign architecture", "signal": signal.SIGSYS}
    if (report.signal == signal.SIGXFSZ or context.file_cut) and limits.file_size is not None:
        return Verdict.disk, {"limit": limits.file_size, "signal": signal.SIGXFSZ}
    if failed and report.flags & lib.REPORT_DISK_FULL:
        return Verdict.disk, {"limit": limits.disk}
    if failed and report.process_denials:
        return Verdict.processes, {"limit": limits.processes, "refused": report.process_denials}
    if report.signal >= 0:
        return Verdict.signal, {"signal": report.signal, **outside}
    return (Verdict.exit, {"exit_code": report.exit_code, **outside}) if failed else (Verdict.ok, {})


def met_outside(report: Any) -> dict[str, Any]:
    """What ran out around the jail: no limit of its policy, so no verdict of a limit."""
    what = [name for name, count in (("memory", report.outer_oom_kills), ("processes", report.outer_process_denials)) if count]
    return {"outside": ", ".join(what)} if what else {}
