"""`nsjail-py doctor`: what this kernel and host offer, what a jail would therefore get, and the remedy for each lack."""

from __future__ import annotations

import errno
import json as jsonlib
import resource
import textwrap
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msgspec import Struct, field, structs

from . import cgroups, hostinfo, idmap, label, launcher, mountinfo, userns
from ._native import lib
from .errors import JailError
from .hostinfo import Host
from .result import Result

WIDTH = 110
MARKS = {"ok": "ok  ", "lack": "LACK", "note": "note"}
TRIAL = ["/bin/true"]


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "lack", "note"]
    """`lack`: a jail under the default policy misses it. `note`: worth knowing, and no harm."""
    text: str
    remedy: str = ""


class Mode(NamedTuple):
    """What a jail gets in one privilege mode."""

    mode: str
    here: bool
    """Whether this process is in it."""
    how: str
    """How a process comes to be in it."""
    user: str
    limits: str
    """Who counts and limits memory, processes and processor time."""


class Report(Struct, frozen=True):
    """Everything that the doctor found."""

    host: Host
    findings: list[Finding]
    modes: list[Mode]
    mode: str
    """Of a jail that this process would start."""
    full: bool = False
    """Whether the default policy was applied in full in a real jail."""
    jail: str = ""
    """How that jail ended."""
    missing: dict[str, str] = field(default_factory=dict)
    """Protections of the default policy that it did not get, with the reason."""


def report(host: Host | None = None) -> Report:
    """Looks at everything, and runs one real jail under the default policy."""
    host = host or hostinfo.probe()
    claim = _claim()
    jail, result = _trial()
    findings = [
        *_kernel(host),
        *_namespaces(host, result is not None),
        *_control_groups(claim),
        *_seccomp(host),
        *_landlock(host),
        *_memory(host, claim),
        _core_dumps(host),
        _labels(),
        _systemd(),
    ]
    missing = {} if result is None else {p.name: p.reason for p in result.protections if p.state == "unavailable"}
    full = result is not None and result.ok and not missing
    return Report(host, findings, _modes(host, claim), claim.mode, full, jail, missing)


def _claim() -> cgroups.Claim:
    """The control groups of a real launcher; where there can be none, those that it would be given."""
    try:
        return launcher.current().claim
    except (JailError, OSError):
        claim = cgroups.claim()
        cgroups.release(claim)
        return claim


# ---------------------------------------------------------------- what is looked at


def _kernel(host: Host) -> list[Finding]:
    lacks = [lack for lack in host.lacks() if lack.name not in ("seccomp", "landlock")]
    who = "root" if host.euid == 0 else f"user {host.euid}"
    machine = f"Linux {host.release}, {host.machine}, {host.cpus} processors, {_gibibytes(host.memory)} memory; {who}"
    found = [Finding("kernel", "ok", machine)]
    if not any(lack.name in hostinfo.CALLS for lack in lacks):
        found.append(Finding("system calls", "ok", f"{', '.join(hostinfo.CALLS)}: all there"))
    if host.euid == 0 and not idmap.covers(launcher.KEPT_ID, 1 + launcher.UID_BLOCK * launcher.UID_BLOCKS):
        found.append(Finding("user ids", "lack", launcher.NO_IDS_REASON, launcher.NO_IDS))
    return found + [Finding(lack.name, "lack", lack.reason, lack.remedy) for lack in lacks]


def _namespaces(host: Host, made: bool) -> list[Finding]:
    """made: whether a jail was made, by the launcher, which may have a profile of its own."""
    refused = userns.refusal(host)
    if refused and made:
        return [Finding(refused.name, "note", f"refused to this process, but not to the launcher: {refused.reason}")]
    if refused:
        return [Finding(refused.name, "lack", refused.reason, refused.remedy)]
    return [Finding("namespaces", "ok", f"user, {', '.join(userns.NAMESPACES)}: all can be made"), *_proc()]


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _proc() -> list[Finding]:
    found = []
    error = lib.probe_proc(1)
    if error in (errno.ENOSYS, lib.PROBE_KILLED):
        return []  # a consequence of what was told under system calls
    if error:
        covered = sorted({mount.target for mount in mountinfo.entries() if mount.target.startswith("/proc/")})
        text = f"a fresh /proc cannot be mounted: {hostinfo.error_text(error)}" + (
            f"; covered here: {', '.join(covered)}" if covered else ""
        )
        remedy = 'docker run --security-opt systempaths=unconfined, podman run --security-opt unmask=ALL, or proc = "none" in the policy'
        found.append(Finding("/proc", "lack", text, remedy))
    else:
        found.append(Finding("/proc", "ok", "a jail can mount its own"))
    hidden = next((o for m in mountinfo.entries() if m.target == "/proc" for o in m.super_options if o.startswith("hidepid=")), "")
    if hidden:
        found.append(Finding("hidepid", "note", f"the host's /proc has {hidden}: other users' processes are hidden from this one already"))
    return found


def _control_groups(claim: cgroups.Claim) -> list[Finding]:
    if claim.kind == "none":
        text = "memory is limited for each process, and for the jail as a whole by looks only"
        return [Finding("control groups", "lack", f"{claim.why}; {text}", claim.remedy)]
    places = ", ".join(str(path.parent) for path in claim.directories.values())
    found = [Finding("control groups", "ok", f"{claim.kind}, below {places}")]
    if claim.reason:
        found.append(Finding("control groups", "note", claim.reason))
    return found


def _seccomp(host: Host) -> list[Finding]:
    lacks = [lack for lack in host.lacks() if lack.name == "seccomp"]
    found = [Finding("seccomp", "lack", lack.reason, lack.remedy) for lack in lacks]
    if not lacks:
        found.append(Finding("seccomp", "ok", f"{', '.join(host.seccomp_actions)}"))
    if host.filtered:
        found.append(Finding("seccomp", "note", "a filter is on this process already; it also holds inside a jail"))
    return found


def _landlock(host: Host) -> list[Finding]:
    if not host.landlock_abi:
        return [Finding("Landlock", "lack", lack.reason, lack.remedy) for lack in host.lacks() if lack.name == "landlock"]
    gives = ", ".join(what for abi, what in hostinfo.LANDLOCK.items() if abi <= host.landlock_abi)
    found = [Finding("Landlock", "ok", f"ABI {host.landlock_abi}: {gives}")]
    lacking = [what for abi, what in hostinfo.LANDLOCK.items() if abi > host.landlock_abi and abi in (4, 6)]
    if lacking:
        text = f"it cannot refuse {', nor '.join(lacking)}; the empty network namespace and the filter do"
        found.append(Finding("Landlock", "note", text, "Linux 6.7 for TCP, 6.12 for abstract sockets and signals"))
    return found


def _core_dumps(host: Host) -> Finding:
    helper, hard = hostinfo.core_helper(), resource.getrlimit(resource.RLIMIT_CORE)[1]
    if not helper or host.euid == 0 or hard != 0:
        return Finding("core dumps", "ok", f"a jail leaves none{helper and f', and {helper} is not started for it'}")
    text = f"a crash inside starts {helper}, as root and beyond every limit, since the hard limit is 0: the kernel leaves it out at 1 alone"
    return Finding("core dumps", "lack", text, "a hard limit of 1 byte or more: ulimit -Hc, LimitCORE= of a unit, limits.conf(5)")


def _memory(host: Host, claim: cgroups.Claim) -> list[Finding]:
    if not host.swap:
        return [Finding("swap", "ok", "none is switched on")]
    amount = _gibibytes(host.swap) if host.swap > 0 else "of an amount that a filter keeps from us"
    if claim.swap:
        return [Finding("swap", "ok", f"{amount}; a jail's use of it is limited")]
    remedy = "swapaccount=1 on the kernel's command line" if claim.kind != "none" else "see control groups"
    return [Finding("swap", "lack", f"{amount}, and no control group limits a jail's use of it", remedy)]


def _labels() -> Finding:
    lacks = label.lacks()
    if all(lacks.values()):
        return Finding("labels", "note", f"{'; '.join(lacks.values())}: no policy can ask for one")
    return Finding("labels", "ok", f"a policy may ask for one: {', '.join(name for name, why in lacks.items() if not why)}")


def _systemd() -> Finding:
    if lack := hostinfo.systemd_lack():
        return Finding("systemd", "note", f"{lack}: no units, and no scope for a user's jails")
    return Finding("systemd", "ok", "it runs this machine: nsjail-py systemd unit writes units for it")


def _cgroup_version() -> str:
    """Which version of control groups has the memory controller of this host."""
    groups = cgroups.memberships(hostinfo.read(Path("/proc/self/cgroup")))
    if any("memory" in group.controllers for group in groups):
        return "v1"
    return "v2" if any(mount.kind == "cgroup2" for mount in mountinfo.entries()) else ""


def _modes(host: Host, claim: cgroups.Claim) -> list[Mode]:
    version = _cgroup_version()
    per_process = "rlimits for each process, looks at all of them"
    whole = f"the whole jail, by control group {version}"
    as_root = whole if version and (host.euid != 0 or claim.kind != "none") else per_process
    delegated = whole if version == "v2" else "not on this host: version 2 of control groups is needed"
    return [
        Mode("root", claim.mode == "root", "started by root", "one of its own for each jail", as_root),
        Mode("delegated", claim.mode == "delegated", f"a user with a systemd, or {cgroups.DELEGATE}", "the caller's", delegated),
        Mode("rootless", claim.mode == "rootless", "started by any user", "the caller's", per_process),
    ]


def _trial() -> tuple[str, Result | None]:
    """One real jail under the default policy."""
    import nsjail_py

    try:
        result = nsjail_py.run(TRIAL)
    except (JailError, OSError) as error:
        return str(error), None
    return f"{' '.join(TRIAL)}: {result.summary}, after {result.setup_time * 1000:.1f} ms of set-up", result


# ---------------------------------------------------------------- how it is told


def text(found: Report) -> str:
    """The report for a person."""
    lines = ["What this host offers", ""]
    for finding in found.findings:
        lines += _wrapped(f"  {MARKS[finding.state]}  {finding.name:<15} ", finding.text)
        if finding.remedy:
            lines += _wrapped(" " * 24 + "remedy: ", finding.remedy)
    lines += ["", "What a jail gets in each privilege mode", ""]
    for mode in found.modes:
        lines += _wrapped(f"  {'here' if mode.here else '':<4}  {mode.mode:<15} ", f"{mode.how}; user: {mode.user}; limits: {mode.limits}")
    lines += ["", "A real jail under the default policy", ""]
    lines += _wrapped("  ", found.jail)
    for name, reason in found.missing.items():
        lines += _wrapped(f"  {MARKS['lack']}  {name:<15} ", f"not applied: {reason}")
    lines += ["", "The default policy can be applied in full." if found.full else "The default policy can NOT be applied in full here."]
    lines += ["To see each promise attacked on this machine: nsjail-py selftest"]
    return "\n".join(lines)


def _wrapped(head: str, body: str) -> list[str]:
    return textwrap.wrap(
        body, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False
    )


def to_dict(found: Report) -> dict[str, Any]:
    """The report, ready for JSON."""
    record = structs.asdict(found)
    record["host"] = structs.asdict(found.host) | {"calls": dict(found.host.calls)}
    record["findings"] = [finding._asdict() for finding in found.findings]
    record["modes"] = [mode._asdict() for mode in found.modes]
    return record


def main(json: bool = False) -> int:
    """Prints the report. 0 when the default policy can be applied in full, 1 otherwise."""
    found = report()
    print(jsonlib.dumps(to_dict(found), indent=2) if json else text(found))
    return 0 if found.full else 1
