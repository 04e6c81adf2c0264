"""From a policy and a program to what the launcher takes: every decision about this host is made here, once per pair."""

from __future__ import annotations

import functools
import os
import stat
import time
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from . import cachedir, cpuset, hostinfo, label, landlock, launcher, plan, rootfs
from ._native import lib
from .errors import PolicyError, Unavailable, during
from .result import Protection

if TYPE_CHECKING:
    from .cgroups import Claim
    from .interpreter import Stamp
    from .policy import Policy
    from .tree import Tree

SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/", "/opt/")
PATH = "/usr/local/bin:/usr/bin:/bin"
LOOK_AGAIN = 1.0
"""Seconds for which a process believes that what a plan was made from is as it was."""
_looked: dict[Path, float] = {}


class Compiled(NamedTuple):
    """One policy, one program, ready to run any number of times."""

    policy: Policy
    plan: bytes
    program: str
    mounts: tuple[rootfs.MountStep, ...]
    protections: tuple[Protection, ...]
    tree: Path | None
    """The cached tree, or unpacked image, that its root is made of."""
    sources: tuple[Stamp, ...] = ()
    """What that was made from."""

    def lasting(self, seconds: float) -> Compiled:
        """The same, ended after so many."""
        policy = replace(self.policy, limits=replace(self.policy.limits, wall_time=seconds))
        return self._replace(policy=policy, plan=plan.with_wall_time(self.plan, seconds))


class Host(NamedTuple):
    """What decides between plans on one host: part of the cache's key."""

    cgroup: str
    """`v1`, `v2` or `none`."""
    cgroup_reason: str
    swap: bool
    root: bool
    landlock_abi: int
    quota: str = ""
    """The group that limits the share of the processors, by its name in plan.GROUPS; empty: none does."""
    cpuset: str = ""
    """The one that says which processors they are."""
    processors: str = ""
    """Those that are ours."""
    tcp: bool = False
    """Whether buffers of TCP have a limit of their own."""
    disks: tuple[str, ...] = ()
    """Those whose use can be limited."""

    @classmethod
    def of(cls, claim: Claim) -> Host:
        """This one, with the control groups and the rights of one launcher: this process may have others by now."""
        groups = (claim.quota, claim.cpuset, claim.processors)
        return cls(claim.kind, claim.reason, claim.swap, claim.mode == "root", landlock_abi(), *groups, claim.tcp, claim.disks)


def for_python(policy: Policy, host: Host) -> Compiled:
    """For scripts: the order brings the script, the root has the interpreter."""
    if policy.root.startswith("oci:"):
        return _of_image(policy, host, policy.python.interpreter or "python3", with_files=True)
    return _standing(_for_python, policy, host, rootfs.sources(policy))


@functools.lru_cache(maxsize=64)
def _for_python(policy: Policy, host: Host, shown: rootfs.Sources) -> Compiled:
    from . import interpreter, tree

    found = interpreter.inspect(policy.python.interpreter)
    points = _mountpoints(policy, shown, f"/{found.prefix.split('/')[1]}") if policy.root == "minimal" else ()
    chosen = policy.python
    with during("minimal root"):
        root = tree.python_tree(found, chosen.imports, points, chosen.without, whole=chosen.whole)
    return _compile(policy, host, root, str(found.executable), None, shown, with_files=True)


def for_program(policy: Policy, host: Host, name: str) -> Compiled:
    """For any program: looked up as a shell would, in the host's PATH. An outside program is shown at /app."""
    if policy.root.startswith("oci:"):
        return _of_image(policy, host, name, with_files=False)
    path, status = find(name)
    return _standing(_for_program, policy, host, path, (status.st_ino, status.st_size, status.st_mtime_ns), rootfs.sources(policy))


def _of_image(policy: Policy, host: Host, name: str, *, with_files: bool) -> Compiled:
    """A program of the image that is the root, found as a shell inside would."""
    from . import oci_image

    return _standing(_from_image, policy, host, name, with_files, oci_image.identity(policy.root), rootfs.sources(policy))


@functools.lru_cache(maxsize=64)
def _from_image(policy: Policy, host: Host, name: str, with_files: bool, identity: tuple[object, ...], shown: rootfs.Sources) -> Compiled:
    from . import oci_image, oci_root

    top = oci_image.unpacked(policy.root)
    program, real = oci_root.find(top, name, PATH)
    return _compile(policy, host, None, program, None, shown, with_files=with_files, image=(top, real))._replace(tree=top)


@functools.lru_cache(maxsize=256)
def _for_program(policy: Policy, host: Host, path: str, identity: tuple[int, int, int], shown: rootfs.Sources) -> Compiled:
    root = None
    if policy.root == "minimal":
        from . import tree

        with during("minimal root"):
            root = tree.program_tree(path, _mountpoints(policy, shown))
    visible = path.startswith(SYSTEM) if policy.root == "minimal" else path.split("/")[1] in rootfs.tops(policy)
    inside = path if visible else f"/app/{os.path.basename(path)}"
    return _compile(policy, host, root, inside, None if visible else (path, inside), shown, with_files=False)


def for_any(policy: Policy, host: Host, inside: str) -> Compiled:
    """For whatever program is shown at `inside` later (saved.py); what stands there now only says which loader programs have here."""
    root, shown = None, rootfs.sources(policy)
    if policy.root == "minimal":
        from . import tree

        with during("minimal root"):
            root = tree.library_tree(_mountpoints(policy, shown))
    return _compile(policy, host, root, inside, ("/bin/sh", inside), shown, with_files=False)


def _standing(make: functools._lru_cache_wrapper[Compiled], *key: Hashable) -> Compiled:
    """What is known for this key, unless its tree was removed from the cache meanwhile, or what that was made from has changed."""
    known = make(*key)
    if known.tree is None or (cachedir.mark_again(known.tree) and _same(known)):
        return known
    make.cache_clear()
    launcher.current().forget_plans()  # it keeps what it has mounted of a plan, and the new one is the same
    return make(*key)


def _same(known: Compiled) -> bool:
    """Most times, a glance at the clock: there are some thirty files to look at."""
    from . import elf, interpreter

    assert known.tree is not None
    if time.monotonic() - _looked.get(known.tree, -LOOK_AGAIN) < LOOK_AGAIN:
        return True
    _looked[known.tree] = time.monotonic()
    if all(interpreter.stamp(source[0]) == source for source in known.sources):
        return True
    elf.cached_libraries.cache_clear()
    return False


def find(name: str) -> tuple[str, os.stat_result]:
    """The program's path on the host, and what it is. Raises FileNotFoundError or PermissionError, as the shell's 127 and 126."""
    if "\0" in name:
        raise PolicyError(f"{name!r} has a NUL character in it")
    try:
        if "/" in name:
            path: str | None = os.path.abspath(name)  # fails where the current directory is gone
        else:
            import shutil

            path = shutil.which(name, path=PATH)
        status = os.stat(path or "")
    except PermissionError:
        raise PermissionError(13, "it lies where this user may not look", name) from None
    except OSError:
        raise FileNotFoundError(2, "no such program", name) from None
    if path is None or stat.S_ISDIR(status.st_mode) or not os.access(path, os.X_OK):
        raise PermissionError(13, "not a program that can be executed", name)
    return path, status


def _mountpoints(policy: Policy, shown: rootfs.Sources, *more: str) -> tuple[str, ...]:
    """Targets of mounts that fall into the tree, which is read-only when they are needed. more: what it has at its top beside the usual."""
    tops = (*SYSTEM, "/etc", *more)
    points = [m.target + ("/" if source.is_directory else "") for m, source in zip(policy.mounts, shown.mounts, strict=True)]
    return tuple(sorted(point for point in points if any(rootfs.is_below(point, top.rstrip("/")) for top in tops)))


def _compile(
    policy: Policy,
    host: Host,
    root: Tree | None,
    program: str,
    outside: tuple[str, str] | None,
    shown: rootfs.Sources,
    *,
    with_files: bool,
    image: tuple[Path, str] | None = None,
) -> Compiled:
    """image: where it is on the host, and a program of it."""
    mounts = tuple(rootfs.build(policy, root, outside, with_files, shown))
    bpf, unknown_from = b"", 0
    late: tuple[int, ...] = ()
    if policy.syscalls is not None:
        from .syscalls import compile_filter

        if lib.probe_notify() == -lib.PROBE_KILLED:  # libseccomp asks the kernel, too
            refusal = "a system call filter kills whoever asks for one of his own"
            raise Unavailable("seccomp", detail=refusal, advice="a systemd unit as `nsjail-py systemd unit` writes it")

        compiled = compile_filter(policy.syscalls)
        bpf, late, unknown_from = compiled.bpf, compiled.late, compiled.unknown_from
    if policy.landlock and not host.landlock_abi:
        reason, remedy = hostinfo.landlock_lack()
        raise Unavailable("landlock", detail=reason, advice=f"{remedy}; or landlock = false in the policy")
    decided = landlock.Decision((0, 0, 0), [])
    if policy.landlock:
        decided = landlock.decide(policy, host.landlock_abi, _executables(program, outside, image), mounts, shown)
    parts = plan.Parts(
        mounts=mounts,
        bpf=bpf,
        late=late,
        unknown_from=unknown_from,
        landlock=decided.masks,
        paths=decided.paths,
        cgroup=_cgroup(policy, host),
        rlimits=plan.rlimits(policy.limits, host.cgroup != "none"),
        label=label.decide(policy),
    )
    tree, sources = (root.path, root.stamps) if root else (None, ())
    return Compiled(policy, plan.compile_plan(policy, parts), program, mounts, protections(policy, host), tree, sources)


def _executables(program: str, outside: tuple[str, str] | None, image: tuple[Path, str] | None) -> list[str]:
    """Where exec is refused: the program, what a `#!` line names, and the loaders that the kernel opens with them."""
    if image:
        from . import oci_root

        return oci_root.executables(image[0], program, image[1], PATH)
    from . import elf, tree

    host = outside[0] if outside else program
    named = [path for path in tree.shebang(host) if tree.is_system(path)]
    return [program, *named, *(loader for path in (host, *named) if (loader := elf.loader(path)))]


def _cgroup(policy: Policy, host: Host) -> list[plan.CgroupWrite]:
    limits = policy.limits
    writes: list[tuple[int, str, int | None]] = []
    if host.cgroup == "v1":
        writes = [(lib.GROUP_MEMORY, "memory.limit_in_bytes", limits.memory)]
        if host.swap:
            writes.append((lib.GROUP_MEMORY, "memory.memsw.limit_in_bytes", limits.memory))
        if host.tcp:
            writes.append((lib.GROUP_MEMORY, "memory.kmem.tcp.limit_in_bytes", limits.memory))
        writes.append((lib.GROUP_PIDS, "pids.max", limits.processes))
    elif host.cgroup == "v2":
        writes = [(lib.GROUP_UNIFIED, "memory.max", limits.memory), (lib.GROUP_UNIFIED, "pids.max", limits.processes)]
        if host.swap and limits.memory is not None:
            writes.append((lib.GROUP_UNIFIED, "memory.swap.max", 0))
        writes.append((lib.GROUP_UNIFIED, "memory.oom.group", 1))
    return [*(plan.CgroupWrite(group, file, str(value)) for group, file, value in writes if value is not None), *_shares(policy, host)]


def _shares(policy: Policy, host: Host) -> list[plan.CgroupWrite]:
    """How many processors, and which, and how much of the disks: what the host has no control group for, `protections` has refused, or the
    policy can do without."""
    limits, lacks, writes = policy.limits, _share_lacks(policy, host), list[plan.CgroupWrite]()
    if limits.cpus is not None and "cpus" not in lacks:
        quota, period = str(round(limits.cpus * plan.PERIOD)), str(plan.PERIOD)
        v1, v2 = {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": quota}, {"cpu.max": f"{quota} {period}"}
        values = v2 if host.cgroup == "v2" else v1
        writes += [plan.CgroupWrite(plan.GROUPS[host.quota], file, value) for file, value in values.items()]
    if limits.cpuset is not None and "cpuset" not in lacks:
        writes.append(plan.CgroupWrite(plan.GROUPS[host.cpuset], "cpuset.cpus", limits.cpuset))
    if limits.io is not None:
        writes += [plan.CgroupWrite(lib.GROUP_UNIFIED, "io.max", f"{disk} rbps={limits.io} wbps={limits.io}") for disk in host.disks]
    return writes


def _share_lacks(policy: Policy, host: Host) -> dict[str, str]:
    """A processor that is not ours is not refused by version 2: it would then say nothing, and let the cell run on all of them."""
    lacks = {}
    for name, group, controller in (("cpus", host.quota, "cpu"), ("cpuset", host.cpuset, "cpuset")):
        if not group:
            lacks[name] = host.cgroup_reason if host.cgroup == "none" else f"our control group has no {controller} controller"
    if policy.limits.cpuset is not None and host.cpuset:
        strange = cpuset.parse(policy.limits.cpuset) - cpuset.parse(host.processors)
        if strange:
            lacks["cpuset"] = f"processors {cpuset.write(strange)} are not ours, which are {host.processors}"
    if not host.disks:
        reasons = {"none": host.cgroup_reason, "v1": "control groups of version 1 count direct writes only"}
        lacks["io"] = reasons.get(host.cgroup, "our control group has no io controller")
    return lacks


NAMESPACES = ("user", "mount", "pid", "net", "ipc", "uts", "cgroup", "time")
ALWAYS = (
    "environment",
    "descriptors",
    "session",
    "keyring",
    "capabilities",
    "no_new_privs",
    "read_only_root",
    "private_dev",
    "private_tmp",
)


def protections(policy: Policy, host: Host, *, judged: bool = False) -> tuple[Protection, ...]:
    """Each protection: asked for, and given or not. Raises Unavailable for one that is missing and not under best_effort, unless the
    policy is only judged (layers/posture.py)."""
    abi = host.landlock_abi
    wanted = dict.fromkeys(ALWAYS, True)
    wanted |= {f"{name}_namespace": name in policy.namespaces for name in NAMESPACES}
    wanted |= {
        "own_uid": policy.own_uid or host.root,
        "groups": True,
        "nested_userns": not policy.nested_userns,
        "private_proc": policy.proc != "none",
    }
    wanted |= {"minimal_root": policy.root == "minimal", "seccomp": policy.syscalls is not None}
    wanted |= {"no_exec": policy.syscalls is not None and not policy.syscalls.exec}
    wanted |= dict.fromkeys(("landlock_fs", "landlock_net", "landlock_scope"), policy.landlock)
    wanted |= {"cgroup": True, "swap": policy.limits.memory is not None}
    wanted |= {"cpus": policy.limits.cpus is not None, "cpuset": policy.limits.cpuset is not None, "io": policy.limits.io is not None}
    wanted |= {"apparmor": policy.apparmor is not None, "selinux": policy.selinux is not None}
    lacks = {name: why for name, why in label.lacks().items() if why} | _share_lacks(policy, host)
    if not host.root:
        lacks["own_uid"] = "only root can give a run a user of its own; it runs as the caller's"
        lacks["groups"] = "only root can leave the caller's supplementary groups"
    if host.cgroup == "none":
        lacks["cgroup"] = host.cgroup_reason
    if host.cgroup == "none" or not host.swap:
        lacks["swap"] = "no cgroup limits swap" if host.cgroup == "none" else "this kernel does not count swap"
    if abi < landlock.NET_ABI:
        lacks["landlock_net"] = f"Landlock ABI {abi}; 4 (Linux 6.7) is needed"
    if abi < landlock.SCOPE_ABI:
        lacks["landlock_scope"] = f"Landlock ABI {abi}; 6 (Linux 6.12) is needed"
    required = [name for name in lacks if wanted[name] and name not in policy.best_effort]
    if required and not judged:
        reasons = "; ".join(f"{name}: {lacks[name]}" for name in required)
        raise Unavailable("protections", detail=reasons, advice=f"or list them under best_effort in policy {policy.name!r}")
    if policy.nested_userns and policy.limits.memory is not None and host.cgroup == "none" and not judged:
        reason = f"nobody counts the memory of what the program mounts: {host.cgroup_reason}"
        raise Unavailable("nested userns", detail=reason, advice='or [limits] memory = "unlimited", or nested_userns = false')
    return tuple(
        Protection(
            name, "not requested" if not asked else "unavailable" if name in lacks else "applied", lacks.get(name, "") if asked else ""
        )
        for name, asked in wanted.items()
    )


@functools.lru_cache(maxsize=1)
def landlock_abi() -> int:
    return max(0, int(lib.probe_landlock_abi()))
