"""The file system inside, as ordered mount steps: what is made, what of the host is shown, and where.

Targets come first, then the root's own trees, then what is private, then what the policy adds, so that no target is ever made
inside something that was mounted (docs/how-it-works.md). native/mounts.c executes the steps one by one.
"""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ._native import lib
from .errors import PolicyError
from .launcher import KEPT_ID

if TYPE_CHECKING:
    from .policy import Policy
    from .tree import Tree

PRIVATE = ("proc", "dev", "tmp", "work", "app", "project")
"""Top-level names that are always the jail's own."""
OF_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Those of the host that root = "system" shows."""

DEVICES = ("null", "zero", "full", "random", "urandom")
DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/ptmx": "pts/ptmx",
}

MASKED = (
    *(
        "acpi",
        "asound",
        "bus",
        "config.gz",
        "fs",
        "interrupts",
        "iomem",
        "ioports",
        "irq",
        "kallsyms",
        "kcore",
        "key-users",
        "keys",
        "kmsg",
    ),
    *("latency_stats", "modules", "sched_debug", "scsi", "slabinfo", "sysrq-trigger", "timer_list", "timer_stats", "vmallocinfo"),
)
"""Files and directories of /proc that tell about the host or reach into it."""

SYSTEMS_OWN = (
    "/",
    "/home",
    "/media",
    "/mnt",
    "/opt",
    "/root",
    "/run",
    "/srv",
    "/tmp",
    "/var",
    "/var/cache",
    "/var/lib",
    "/var/log",
    "/var/tmp",
)
SYSTEMS_TREES = ("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/sbin", "/sys", "/usr")
"""What no run is given as its work directory: hier(7)."""

AUDIT, AUDIT_INSIDE = Path(__file__).with_name("_audit.abi3.so"), "/.audit.so"
"""The audit hook, for interpreters that are to tell."""
SYSTEM_ETC = ("alternatives", "ld.so.cache")
"""What programs in /usr cannot do without: Debian's links to the chosen variants, and the loader's list of libraries."""


class MountStep(NamedTuple):
    """One row of the plan's mount table; native/plan.h says what each kind does."""

    kind: int
    target: str
    source: str = ""
    flags: int = 0
    mode: int = 0o755
    size: int = 0
    inodes: int = 0
    lasting: bool = False
    """A bind whose source is the same file for as long as this process lives: ours by content, or a device."""


class Source(NamedTuple):
    """A path of the host's that a policy shows, and what of it decides the plan."""

    path: str
    """The real one."""
    is_directory: bool
    is_roots: bool


class Sources(NamedTuple):
    """All of one policy, as they are now: part of the plan's key, since each may be another by the next run."""

    workdir: str | None = None
    mounts: tuple[Source, ...] = ()
    project: Source | None = None


NONE = Sources()


class Root:
    """Collects the steps of one root: `steps()` gives them in the order in which they are safe."""

    def __init__(self) -> None:
        self.targets: dict[str, MountStep] = {}
        self.mounts: list[MountStep] = []

    def directory(self, path: str, mode: int = 0o755) -> None:
        parent = posixpath.dirname(path)
        if parent != "/":
            self.directory(parent)
        self.targets.setdefault(path, MountStep(lib.MOUNT_DIRECTORY, path, mode=mode))

    def file(self, path: str) -> None:
        if posixpath.dirname(path) != "/":
            self.directory(posixpath.dirname(path))
        self.targets.setdefault(path, MountStep(lib.MOUNT_FILE, path))

    def symlink(self, path: str, text: str) -> None:
        if posixpath.dirname(path) != "/":
            self.directory(posixpath.dirname(path))
        self.targets.setdefault(path, MountStep(lib.MOUNT_SYMLINK, path, text))

    def bind(self, source: str, target: str, flags: int = 0, *, lasting: bool = False, is_directory: bool | None = None) -> None:
        """A file or directory of the host; its target is made unless it lies in a tree that is mounted before."""
        if not self.inside_mount(target):
            is_directory = os.path.isdir(source) if is_directory is None else is_directory
            (self.directory if is_directory else self.file)(target)
        self.mounts.append(MountStep(lib.MOUNT_BIND, target, source, flags, lasting=lasting))

    def inside_mount(self, target: str) -> bool:
        return any(is_below(target, step.target) for step in self.mounts if step.kind in (lib.MOUNT_BIND, lib.MOUNT_PART))

    def steps(self) -> list[MountStep]:
        return [*self.targets.values(), *self.mounts]


def is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def tops(policy: Policy) -> list[str]:
    """Top-level names of the host below which any program has the same path inside."""
    if policy.root == "host":
        return [name for name in sorted(os.listdir("/")) if name not in PRIVATE]
    return list(OF_SYSTEM) if policy.root == "system" else []


def sources(policy: Policy) -> Sources:
    """What the policy shows of the host, looked at for each run. Raises PolicyError for what is not there. A work directory of root's is
    given away."""
    project = policy.python.project
    if policy.workdir is None and not policy.mounts and not project:
        return NONE
    return Sources(
        None if policy.workdir is None else _workdir(policy.workdir),
        tuple(_source(mount.source, f"mount on {mount.target}") for mount in policy.mounts),
        _directory(project, "$.python.project") if project else None,
    )


def _source(path: str, where: str) -> Source:
    try:
        real = os.path.realpath(path)
        status = os.stat(real)
        left = _left_link(path, real, status.st_uid)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{where}: {path!r}: {error.strerror if isinstance(error, OSError) else error}") from None
    if left:
        raise PolicyError(f"{where}: {path!r}: {left!r} is a link of somebody who does not own what it leads to, perhaps of an earlier run")
    return Source(real, stat.S_ISDIR(status.st_mode), status.st_uid == 0)


def _left_link(path: str, real: str, owner: int) -> str:
    """A link on the way that root must not follow: it is neither root's, nor of the owner of what it leads to. What runs leave in work
    directories of root's belongs to one id, so that follows no link at all. proc_sys_fs(5), protected_symlinks"""
    if os.geteuid() or real == os.path.abspath(path):
        return ""
    whole, names = "/", [name for name in os.path.join(os.getcwd(), path).split("/")[::-1] if name]
    while names:
        place = os.path.join(whole, names.pop())
        status = os.lstat(place)
        if not stat.S_ISLNK(status.st_mode):
            whole = os.path.normpath(place)
            continue
        if status.st_uid and (status.st_uid != owner or status.st_uid == KEPT_ID):
            return place
        target = os.readlink(place)
        whole = "/" if target.startswith("/") else whole
        names += [name for name in target.split("/")[::-1] if name]
    return ""


def _directory(path: str, where: str) -> Source:
    found = _source(path, where)
    if not found.is_directory:
        raise PolicyError(f"{where}: {path!r} is not a directory")
    return found


def _workdir(path: str) -> str:
    found = _directory(path, "$.workdir")
    if found.is_roots and not os.geteuid():
        if found.path in SYSTEMS_OWN or any(is_below(found.path, top) for top in SYSTEMS_TREES):
            raise PolicyError(f"$.workdir: {path!r} is the system's, and would be given to the run: make a directory for it")
        _leave_root(found.path)
    return found.path


def _leave_root(directory: str) -> None:
    """A work directory of root's is given to an id that no run has: what is left there is neither root's nor another run's."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid == 0:
            os.fchown(descriptor, KEPT_ID, KEPT_ID)
    finally:
        os.close(descriptor)


def build(policy: Policy, tree: Tree | None, program: tuple[str, str] | None, with_files: bool, shown: Sources) -> list[MountStep]:
    """The mount steps for this policy.

    tree: the cached minimal root of the program, where the policy wants one. program: (host path, path inside) of a program from
    outside the root. with_files: whether the order brings files for /app.
    """
    root = Root()
    _base(root, policy, tree)
    if with_files and policy.python.audit != "off":
        root.bind(str(AUDIT), AUDIT_INSIDE, lasting=True)
    _devices(root)
    if policy.proc != "none":
        _proc(root, policy)
    _writable(root, policy, with_files, shown.workdir)
    if program:
        root.bind(program[0], program[1])
    for mount, source in zip(policy.mounts, shown.mounts, strict=True):
        _extra(root, source, mount.target, mount.writable, mount.executable)
    if shown.project:
        _extra(root, shown.project, "/project", False, True)
    if policy.proc == "masked":
        root.mounts += [MountStep(lib.MOUNT_MASK, f"/proc/{name}", flags=lib.MOUNT_NOEXEC) for name in MASKED]
        root.mounts.append(MountStep(lib.MOUNT_READONLY, "/proc/sys", flags=lib.MOUNT_NOEXEC))
    return root.steps()


def _base(root: Root, policy: Policy, tree: Tree | None) -> None:
    shown: dict[str, Path] = {}
    if policy.root == "system":
        shown = {name: Path("/", name) for name in OF_SYSTEM}
    elif policy.root != "minimal":
        if policy.root.startswith("oci:"):
            from .oci_image import unpacked

            top = unpacked(policy.root)
        else:
            top = Path("/" if policy.root == "host" else policy.root)
        if not top.is_dir():
            raise PolicyError(
                f"$.root: no directory {str(top)!r}; allowed: minimal, system, host, the absolute path of a directory, or oci:PATH[:TAG]"
            )
        shown = {name: top / name for name in sorted(os.listdir(top))}
    if tree is not None:
        # Beside a root of the host's, the tree only adds what is not there for the jail's user: an interpreter in somebody's home, mostly.
        names = [entry.name for entry in tree.entries]
        extra = (
            names
            if policy.root == "minimal"
            else [name for name in names if name not in ("usr", "bin", "sbin", "etc") and name[:3] != "lib"]
        )
        shown.update({name: tree.path / name for name in extra})
    if policy.root == "system":
        shown |= {f"etc/{name}": Path("/etc", name) for name in SYSTEM_ETC}
    for name, path in shown.items():
        if name in PRIVATE:
            continue
        if path.is_symlink():
            root.symlink(f"/{name}", os.readlink(path))
        elif path.is_dir() or path.is_file():
            ours = policy.root.startswith("oci:") or (tree is not None and path.parent == tree.path)
            root.bind(str(path), f"/{name}", lasting=ours)


def _devices(root: Root) -> None:
    for name in DEVICES:
        root.bind(f"/dev/{name}", f"/dev/{name}", lib.MOUNT_DEVICES | lib.MOUNT_NOEXEC, lasting=True)
    for path, text in DEVICE_LINKS.items():
        root.symlink(path, text)
    root.directory("/dev/pts")
    root.mounts.append(MountStep(lib.MOUNT_DEVPTS, "/dev/pts", flags=lib.MOUNT_DEVICES | lib.MOUNT_NOEXEC))


def _proc(root: Root, policy: Policy) -> None:
    root.directory("/proc", 0o555)
    flags = lib.MOUNT_NOEXEC | (lib.MOUNT_PIDS_ONLY if policy.proc == "pid" else 0)
    if policy.nested_userns:  # whose ids are set by files in it
        flags |= lib.MOUNT_WRITABLE
    root.mounts.append(MountStep(lib.MOUNT_PROC, "/proc", flags=flags))


def _writable(root: Root, policy: Policy, with_files: bool, workdir: str | None) -> None:
    """One tmpfs holds all that can be written, so one number limits it."""
    noexec = 0 if policy.exec_in_writable else lib.MOUNT_NOEXEC
    own = lib.MOUNT_WRITABLE | lib.MOUNT_OWNED | noexec
    for path in ("/tmp", "/work", "/dev/shm", "/app"):
        root.directory(path)
    size = policy.limits.disk if policy.limits.disk is not None else 0
    root.mounts.append(MountStep(lib.MOUNT_SCRATCH, "/tmp", flags=lib.MOUNT_WRITABLE | noexec, size=size, inodes=policy.limits.files or 0))
    parts = [("shm", "/dev/shm", own, 0o1777), ("tmp", "/tmp", own, 0o1777)]
    if with_files:
        parts.insert(0, ("app", "/app", lib.MOUNT_APP | lib.MOUNT_OWNED | noexec, 0o755))
    if workdir is None:
        parts.insert(0, ("work", "/work", own, 0o700))
    else:
        flags = lib.MOUNT_WRITABLE | lib.MOUNT_IDMAP | noexec
        root.mounts.append(MountStep(lib.MOUNT_BIND, "/work", workdir, flags))
    root.mounts += [MountStep(lib.MOUNT_PART, target, name, flags, mode) for name, target, flags, mode in parts]


def _extra(root: Root, source: Source, target: str, writable: bool, executable: bool) -> None:
    # The owner of a writable source is the jail's user inside. Root's own files never are: there, the permission bits decide.
    idmap = 0 if source.is_roots else lib.MOUNT_IDMAP
    flags = (lib.MOUNT_WRITABLE | idmap if writable else 0) | (0 if executable else lib.MOUNT_NOEXEC)
    root.bind(source.path, target, flags, is_directory=source.is_directory)
