"""A compiled policy in a file, for the launcher alone (native/alone.c): `nsjail-launcher FILE -- CMD [ARGS...]`, and no Python.

The file holds what is decided here: the plan, the environment, where the launcher finds host ids and control groups of its own, and what
the plan was made from. It is bound to this host and this user. What may differ from run to run is found by the launcher: the program,
variables that the policy passes on, the control group that it is started in. What it checks before: native/saved.c.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from . import cgroups, launcher, mountinfo
from ._native import ffi, lib
from .compiled import PATH, Compiled, Host, find, for_any, for_program, for_python, landlock_abi
from .errors import PolicyError, SetupError
from .interpreter import inspect, stamp
from .plan import GROUPS, Block, with_slot
from .policyfile import resolve
from .reports import STEP_NAMES
from .rootfs import tops

if TYPE_CHECKING:
    from .policy import Policy

KINDS = ("memory", "pids", "cpu", "unified")
"""Groups that the launcher alone makes."""
ANY = "/app/program"
"""Where a program is inside that the plan was not made for."""
WORD = 8
FNV_START, FNV_PRIME = 14695981039346656037, 1099511628211


class Group(NamedTuple):
    """Where the launcher makes a control group: below its own (version 1), or below the one of all root's launchers (version 2)."""

    group: int
    controller: str
    mount: str
    root: str


def save(policy: Policy | str | os.PathLike[str], path: str | os.PathLike[str], program: str | None = None) -> None:
    """Writes the plan for a program, or for any, to a file that only its owner can write. Raises PolicyError and SetupError, and
    FileNotFoundError or PermissionError for a program."""
    loaded = resolve(policy)
    if loaded.backend != "native" or loaded.root.startswith("oci:"):
        raise PolicyError(f"policy {loaded.name!r}: the launcher alone has neither another backend nor images")
    groups, host = _host()
    named = None if program is None else find(program)[0]
    compiled = for_any(loaded, host, ANY) if named is None else _for(loaded, host, named)
    _write(Path(path), _block(loaded, host, groups, compiled, named))


def _for(policy: Policy, host: Host, program: str) -> Compiled:
    """The policy's interpreter comes with its library."""
    if os.path.basename(program).startswith("python") and os.path.samefile(program, inspect(policy.python.interpreter).executable):
        return for_python(policy, host)
    return for_program(policy, host, program)


def _host() -> tuple[list[Group], Host]:
    """What this host gives a launcher that has no Python to ask for it: as root, the control groups that it can make by itself."""
    claim = launcher.current().claim
    root, groups, kind, reason, swap, tcp = os.geteuid() == 0, _groups(claim), claim.kind, claim.reason, claim.swap, claim.tcp
    if not groups and kind != "none":
        kind, reason = "none", "a delegated control group is for Python's launcher: the launcher alone makes none"
        swap = tcp = False
    return groups, Host(kind, reason, swap, root, landlock_abi(), tcp=tcp)


def _groups(claim: cgroups.Claim) -> list[Group]:
    mounts = sorted((mount for mount in mountinfo.entries() if mount.kind in ("cgroup", "cgroup2")), key=lambda mount: len(mount.target))
    found = []
    for name, directory in sorted(claim.directories.items(), key=lambda item: GROUPS[item[0]]):
        mount = next(mount for mount in reversed(mounts) if directory.is_relative_to(mount.target))
        if claim.kind == "v2" and (os.geteuid() or directory.parent != Path(mount.target, cgroups.PREFIX)):
            return []
        if name not in KINDS:
            continue  # nothing is limited there, so a policy that asks for it is refused
        if claim.kind == "v1" and (directory / "cpuset.cpus").exists():  # a new group takes no process before it is given processors
            return []
        controller = "" if claim.kind == "v2" else cgroups.V1_CONTROLLERS[name]
        found.append(Group(GROUPS[name], controller, mount.target, mount.root))
    return found


def _block(policy: Policy, host: Host, groups: list[Group], compiled: Compiled, program: str | None) -> bytes:
    block = Block("struct saved")
    head, plan = block.head, compiled.plan
    head.magic, head.uid = lib.SAVED_MAGIC, os.geteuid()
    head.output = policy.limits.output or 0
    head.release, head.search, head.inside = block.string(os.uname().release), block.string(PATH), block.string(compiled.program)
    if compiled.tree is not None:
        head.tree = block.string(os.fspath(compiled.tree))
    if program is None:
        plan, head.slot = with_slot(plan, ANY)
    else:
        head.program = block.string(program)
    if host.root:
        head.locks = block.string(os.fspath(launcher.LOCKS))
        head.uid_base, head.uid_block, head.uid_blocks = launcher.UID_BASE, launcher.UID_BLOCK, launcher.UID_BLOCKS
    head.cgroup_kind = launcher.KINDS[host.cgroup]
    if host.cgroup == "v2":
        head.controllers = block.string(_controllers(launcher.current().claim.directories["unified"]))
    head.plan.offset, head.plan.count = block.put(plan), len(plan)
    sources = [*compiled.sources, *([stamp(program)] if program else [])]
    block.table(head.sources, "struct saved_file", ({"size": s, "mtime_ns": t, "path": block.string(p)} for p, s, t in sources))
    block.table(
        head.groups,
        "struct saved_group",
        (
            {"group": g.group, "controller": block.string(g.controller) if g.controller else 0}
            | {"mount": block.string(g.mount), "root": block.string(g.root)}
            for g in groups
        ),
    )
    block.strings(head.visible, _visible(policy))
    _environment(block, policy)
    block.strings(head.steps, [STEP_NAMES[number] for number in range(len(STEP_NAMES))])
    return _with_checksum(block.finish())


def _controllers(group: Path) -> str:
    """Those that a group of a launcher of ours has, which so far can be handed on."""
    return " ".join(f"+{name}" for name in (group / "cgroup.controllers").read_text().split())


def _visible(policy: Policy) -> list[str]:
    """Where programs have the same path inside, and may be executed there."""
    if policy.syscalls is not None and not policy.syscalls.exec:
        return []
    return [f"/{name}/" for name in tops(policy)]


def _environment(block: Block, policy: Policy) -> None:
    """As jail.environment: the policy's own variables come last, so the caller's do not take their place."""
    from .jail import environment

    fixed = environment(structs.replace(policy, env_pass=()))
    block.strings(block.head.environment, [f"{name}={value}" for name, value in fixed.items()])
    block.strings(block.head.passed, [name for name in policy.env_pass if name not in policy.env])


def _with_checksum(block: bytes) -> bytes:
    changed = bytearray(block)
    head = ffi.from_buffer("struct saved *", changed)
    begin, total = ffi.offsetof("struct saved", "checksum") + WORD, FNV_START
    for word in memoryview(bytes(changed[begin : len(changed) - (len(changed) - begin) % WORD])).cast("Q"):
        total = (total ^ word) * FNV_PRIME % (1 << 64)
    head.checksum = total
    return bytes(changed)


def _write(path: Path, data: bytes) -> None:
    """As a whole; the name never stands for half a plan. A device or a pipe is written to, and a link leads to what is replaced."""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path = path.resolve()
        descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    except OSError as error:
        raise SetupError("plan", error.errno or 0, str(path)) from None
