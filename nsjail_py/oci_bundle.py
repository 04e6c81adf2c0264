"""A policy as an OCI runtime bundle: a directory with config.json and rootfs, for crun, runc and runsc. runtime-spec, config.md

The same mount steps, rules and limits as for our own launcher, in the words of the specification. What it has no word for (Landlock, one
limit over all that is written, refusing exec after the start, clocks) is listed: in `unavailable`, and as an annotation of the bundle.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import oci_seccomp, plan
from ._native import lib
from .errors import PolicyError, Unavailable
from .jail import Jail, environment
from .launcher import UID_BASE, UID_BLOCK, UID_BLOCKS
from .plan import INSIDE_ID, OrderFile
from .policy import Policy
from .rootfs import MASKED, MountStep, is_below

if TYPE_CHECKING:
    from .compiled import Compiled

VERSION = "1.0.2"
ID_BASE = UID_BASE + UID_BLOCK * UID_BLOCKS
"""The host id that 0 inside is: above all of the launcher's."""
NAMESPACES = {"user": "user", "mount": "mount", "pid": "pid", "net": "network", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup"}
RLIMITS = {value: name for name, value in vars(resource).items() if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"}
DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "strictatime", "mode=755", "size=64k"]}
DEVPTS = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
OWN_KERNEL = {"runsc": 256}
"""Runtimes with a kernel of their own, and how many threads it has, which count with the program's. To it a mount is one, with all that is
mounted below; the others keep the options of such mounts, unless they are told the same for all (`rro`), and a file has none below."""
BEYOND = {
    "landlock": "the specification has no word for Landlock",
    "one_limit_for_files": "/work, /tmp and /dev/shm have the limit `disk` each, and not together; nothing limits their number",
    "clocks": "wall_time and idle_time are kept by whoever runs it; cpu_time by RLIMIT_CPU, for each process",
    "noexec": "crun 1.8 leaves it out where a mount is a single file that may be written",
    "private_proc": "runsc shows all of its own kernel's /proc; of the host it tells the processor and how much memory there is",
    "output": "is limited by whoever reads it",
    "no_exec": "execve stays allowed: the runtime starts the program under the filter",
    "own_uid": "all runs of bundles share one range of host ids",
    "nested_userns": "a runtime sets no limit on user namespaces within; only a filter refuses them",
    "time_namespace": "version 1.0 of the specification has no word for it",
    "label": "no runtime is asked for AppArmor's profile or SELinux's context",
    "io": "a limit for a disk names it by its number, which another host gives to another",
    "place": "scheduling, nice value, I/O class, OOM score and personality are those of whoever runs it",
    "denied": "which calls were denied is not told",
    "on_denied": "a denied call fails, and does not end the run",
}


class Bundle(NamedTuple):
    """What was written."""

    directory: Path
    unavailable: dict[str, str]
    """Protections of the policy that a runtime cannot give, and why."""


def bundle(policy: Policy | str | os.PathLike[str], directory: str | os.PathLike[str], args: Sequence[str], runtime: str = "") -> Bundle:
    """Writes a bundle that holds all it needs: a minimal root is copied into it. runtime: for which, where that matters (`runsc`).
    Raises PolicyError, FileNotFoundError for no such program."""
    if not args:
        raise PolicyError("no program: the argument list is empty")
    jail = Jail(policy)
    compiled = jail.compiled_for(args[0])
    return write(compiled, Path(directory), [compiled.program, *args[1:]], copied=True, runtime=runtime)


def write(
    compiled: Compiled,
    directory: Path,
    argv: Sequence[str],
    files: Iterable[OrderFile] = (),
    *,
    copied: bool = False,
    own_ids: bool = True,
    runtime: str = "",
) -> Bundle:
    """config.json and rootfs. copied: the minimal root is copied, else mounted. own_ids: with a user namespace, which some runtimes cannot
    have where the root lies in a directory of root's."""
    if os.geteuid():
        raise Unavailable("bundle", detail="its user ids are root's to give", advice="write it as root")
    new = [path for path in (*reversed(directory.parents), directory, directory / "rootfs") if not path.exists()]
    try:
        for path in new or [directory / "rootfs"]:
            _mkdir(path)
    except (FileExistsError, NotADirectoryError):
        raise PolicyError(f"{directory}: there is a bundle already, or it is no directory") from None
    try:
        unavailable = _fill(directory, compiled, argv, files, copied, own_ids, runtime)
    except BaseException:
        shutil.rmtree(new[0], ignore_errors=True)
        raise
    return Bundle(directory, unavailable)


def _fill(
    directory: Path, compiled: Compiled, argv: Sequence[str], files: Iterable[OrderFile], copied: bool, own_ids: bool, runtime: str
) -> dict[str, str]:
    config = _config(compiled, argv, own_ids, OWN_KERNEL.get(runtime, 0))
    root = Path(os.path.realpath(directory / "rootfs"))
    copy = _copier() if copied else None
    config["mounts"] += [mount for step in compiled.mounts if (mount := _step(step, root, compiled.policy, copy, own_ids, runtime))]
    for file in files:
        _write(root / "app" / file.name, file.data, ID_BASE + INSIDE_ID)
    unavailable = _unavailable(compiled.policy, runtime)
    config["annotations"] = {"nsjail_py.policy": compiled.policy.name, "nsjail_py.unavailable": "; ".join(unavailable)}
    _write(directory / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    return unavailable


def _write(path: Path, data: bytes, group: int = 0) -> None:
    """For root, and for the container's group: everybody may go through a bundle's directories, and a run's script, arguments and
    environment are its caller's."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        os.fchown(file.fileno(), 0, group)
        os.fchmod(file.fileno(), 0o640 if group else 0o600)
        file.write(data)


def _mkdir(path: Path) -> None:
    """For everybody to go through, whatever the caller's umask is."""
    path.mkdir()
    path.chmod(0o755)


def _config(compiled: Compiled, argv: Sequence[str], own_ids: bool, threads: int) -> dict[str, Any]:
    policy = compiled.policy
    ids = [{"containerID": 0, "hostID": ID_BASE, "size": INSIDE_ID + 1}]
    names = [NAMESPACES[name] for name in policy.namespaces if name in NAMESPACES and (own_ids or name != "user")]
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in names],
        "resources": _resources(policy, threads),
        "maskedPaths": [f"/proc/{name}" for name in MASKED],
        "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"],
        "rootfsPropagation": "private",
    }
    if own_ids:
        linux |= {"uidMappings": ids, "gidMappings": ids}
    if policy.syscalls is not None:
        linux["seccomp"] = oci_seccomp.write(policy.syscalls, executes=True)
    none: dict[str, list[str]] = {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")}
    user = INSIDE_ID if own_ids else ID_BASE + INSIDE_ID
    process = {
        "terminal": False,
        "user": {"uid": user, "gid": user, "umask": 0o022},
        "args": list(argv),
        "env": [f"{name}={value}" for name, value in environment(policy).items()],
        "cwd": "/work",
        "capabilities": none,
        "noNewPrivileges": True,
        "rlimits": [
            {"type": RLIMITS[kind], "hard": value, "soft": value} for kind, value in plan.rlimits(policy.limits, have_cgroup=True).items()
        ],
    }
    return {
        "ociVersion": VERSION,
        "process": process,
        "root": {"path": "rootfs", "readonly": True},
        "hostname": policy.hostname if "uts" in policy.namespaces else "",
        "mounts": [DEV],
        "linux": linux,
    }


def _resources(policy: Policy, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if policy.limits.memory is not None:
        found["memory"] = {"limit": policy.limits.memory, "swap": policy.limits.memory}
    cpu: dict[str, Any] = {}
    if policy.limits.cpus is not None:
        cpu |= {"quota": round(policy.limits.cpus * plan.PERIOD), "period": plan.PERIOD}
    if policy.limits.cpuset is not None:
        cpu["cpus"] = policy.limits.cpuset
    if cpu:
        found["cpu"] = cpu
    if policy.limits.processes is not None:
        found["pids"] = {"limit": policy.limits.processes + threads}
    return found


def _copier() -> Callable[[str, str], None]:
    """Copies files, and what are links to one file stay links: an image may have a hundred thousand to a large one."""
    made: dict[tuple[int, int], str] = {}

    def copy(source: str, target: str) -> None:
        status = os.stat(source)
        first = made.setdefault((status.st_dev, status.st_ino), target) if status.st_nlink > 1 else target
        if first == target:
            shutil.copy2(source, target)
        else:
            Path(target).unlink(missing_ok=True)  # the place of a mount
            os.link(first, target)

    return copy


def _step(
    step: MountStep, root: Path, policy: Policy, copy: Callable[[str, str], None] | None, own_ids: bool, runtime: str
) -> dict[str, Any] | None:
    """One mount step: done in rootfs, or the mount that does it at the start. copy: what lasts is copied, and not mounted."""
    own = step.target == "/dev" or (is_below(step.target, "/dev") and step.target != "/dev/shm")
    if own and step.kind != lib.MOUNT_DEVPTS:
        if step.kind == lib.MOUNT_DIRECTORY and step.target == "/dev":
            _mkdir(_place(root, step))
        return None
    if step.kind == lib.MOUNT_DIRECTORY:
        _mkdir(_place(root, step))
    elif step.kind == lib.MOUNT_FILE:
        path = _place(root, step)
        path.touch()
        path.chmod(0o644)
    elif step.kind == lib.MOUNT_SYMLINK:
        _place(root, step).symlink_to(step.source)
    elif step.kind == lib.MOUNT_BIND and copy and step.lasting:
        if os.path.isdir(step.source):
            shutil.copytree(step.source, _place(root, step), symlinks=True, dirs_exist_ok=True, copy_function=copy)
        else:
            copy(step.source, str(_place(root, step)))
    elif step.kind == lib.MOUNT_BIND:
        mount = _mount(step, "bind", step.source, ["rbind", "rw" if step.flags & lib.MOUNT_WRITABLE else "ro"])
        if os.path.isdir(step.source) and runtime not in OWN_KERNEL:
            mount["options"] += [f"r{option}" for option in mount["options"] if option in ("ro", "nosuid", "nodev", "noexec")]
        return mount
    elif step.kind == lib.MOUNT_PART and step.flags & lib.MOUNT_APP:
        pass  # its files are in rootfs
    elif step.kind == lib.MOUNT_PART:
        user = INSIDE_ID if own_ids else ID_BASE + INSIDE_ID
        size = [f"size={policy.limits.disk}"] if policy.limits.disk is not None else []
        return _mount(step, "tmpfs", "tmpfs", [f"mode={step.mode:o}", f"uid={user}", f"gid={user}", *size])
    elif step.kind == lib.MOUNT_PROC:
        return _mount(step, "proc", "proc", ["subset=pid"] if step.flags & lib.MOUNT_PIDS_ONLY and runtime not in OWN_KERNEL else [])
    elif step.kind == lib.MOUNT_DEVPTS:
        return {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": DEVPTS}
    return None


def _place(root: Path, step: MountStep) -> Path:
    """Where a target is made. A link among the names that lead to it is the image's, and would have root write to wherever on the host it
    says; the launcher refuses such a target, too."""
    path = root / step.target.lstrip("/")
    if os.path.realpath(path) != str(path):
        raise PolicyError(f"mount on {step.target}: a symbolic link of the root's leads to it")
    return path


def _mount(step: MountStep, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    flags = ["nosuid", "nodev", *(["noexec"] if step.flags & lib.MOUNT_NOEXEC else [])]
    return {"destination": step.target, "type": kind, "source": source, "options": [*options, *flags]}


def executes_files(policy: Policy, runtime: str) -> bool:
    """Whether BEYOND's `noexec` is about this policy."""
    files = (mount for mount in policy.mounts if mount.writable and not mount.executable and os.path.isfile(mount.source))
    return runtime in ("", "crun") and any(files)


def _unavailable(policy: Policy, runtime: str) -> dict[str, str]:
    asked = {
        "noexec": executes_files(policy, runtime),
        "private_proc": policy.proc == "pid" and (not runtime or runtime in OWN_KERNEL),
        "landlock": policy.landlock,
        "no_exec": policy.syscalls is not None and not policy.syscalls.exec,
        "time_namespace": "time" in policy.namespaces,
        "label": policy.apparmor is not None or policy.selinux is not None,
        "io": policy.limits.io is not None,
        "denied": policy.syscalls is not None,
        "on_denied": policy.syscalls is not None and policy.syscalls.on_denied == "kill",
    }
    return {name: why for name, why in BEYOND.items() if asked.get(name, True)}
