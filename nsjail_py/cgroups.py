"""Which control groups are ours to make cells in.

`claim` makes one directory for one launcher, below it the launcher makes one for each cell. We only ever make and remove directories of our
own, and move processes only inside a subtree that was delegated to us. cgroups(7), the kernel's admin-guide/cgroup-v1 and cgroup-v2,
systemd's CGROUP_DELEGATION.

    v1                      below the group that we run in, in each controller's hierarchy
    v2, delegated to us     below our own group, whose processes move to its leaf `main`: a group with processes cannot hand controllers on;
                            or below the one around it that was delegated (DelegateSubgroup=)
    v2, root                below /sys/fs/cgroup/nsjail_py
    v2, a user's manager    below a scope that it makes for the launcher alone (scope.py)
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from . import mountinfo

Mode = Literal["root", "delegated", "rootless"]

PREFIX = "nsjail_py"
LEAF = "main"
V1_CONTROLLERS = {"memory": "memory", "pids": "pids", "cpu": "cpuacct", "quota": "cpu", "cpuset": "cpuset"}
"""The launcher's name of a group, and the controller that it needs there."""
REQUIRED = ("memory", "pids")
COUNTED = (*REQUIRED, "cpu")
"""The launcher's groups that count what a run uses; the others only limit it."""
WANTED = ("cpu", "cpuset", "io")
DELEGATE = "systemd-run --user --scope -p Delegate=yes COMMAND"
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""These say nothing about the host's control groups."""
TRIES = 100
PAUSE = 0.005


class Claim(msgspec.Struct, frozen=True):
    """What this process may use for its jails."""

    kind: Literal["v1", "v2", "none"]
    mode: Mode
    directories: dict[str, Path] = msgspec.field(default_factory=dict)
    """For v1 a directory for each of `memory`, `pids`, and where there are some `cpu`, `quota` and `cpuset`; for v2 `unified`."""
    why: str = ""
    """Why there is none, or what is missing from what there is."""
    remedy: str = ""
    """What to do about it."""
    swap: bool = False
    """Whether the use of swap can be limited."""
    tcp: bool = False
    """Whether buffers of TCP are limited apart from other memory, as version 1 does."""
    quota: str = ""
    """The directory that limits the share of the processors; empty: none does."""
    cpuset: str = ""
    """The directory that says which processors they are."""
    processors: str = ""
    """Those that are ours, as the kernel lists them."""
    disks: tuple[str, ...] = ()
    """Numbers (`8:0`) of the disks whose use can be limited."""

    @property
    def reason(self) -> str:
        """Why, and what to do, in one line; empty when all is well."""
        return ": ".join(part for part in (self.why, self.remedy) if part)


class Membership(msgspec.Struct, frozen=True):
    """One line of /proc/self/cgroup."""

    controllers: tuple[str, ...]
    """Empty for v2."""
    path: str


class _NoneError(Exception):
    """This way leads nowhere: why, and what to do."""


def memberships(text: str) -> list[Membership]:
    """What /proc/PID/cgroup says. A path may hold colons, and ends in ` (deleted)` when the group is gone."""
    fields = [line.split(":", 2) for line in text.splitlines()]
    return [Membership(tuple(names.split(",")) if names else (), path) for _, names, path in fields]


def visible(path: str, mounts: list[mountinfo.Entry]) -> Path | None:
    """Where the group `path` is seen, among the mounts of its hierarchy. In a container only a part of the hierarchy may be mounted."""
    found = None
    for mount in mounts:
        root = mount.root.rstrip("/")
        if ".." in path.split("/") or not (path == root or path.startswith(root + "/")):
            continue
        place = Path(mount.target + path[len(root) :])
        if place.is_dir() and (found is None or not mount.read_only):
            found = place
    return found


def claim(launcher: int = 0) -> Claim:
    """Makes the directories of one launcher, and removes those of callers that are dead. `reason` says why there are none;
    an error is only what passes: no descriptor, no memory.

    launcher: its process, which is moved into a scope of its own where we are in no group that is ours; 0: there is none to be moved.
    """
    root = os.geteuid() == 0
    try:
        groups = memberships(Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape"))
        mounts = [mount for mount in mountinfo.entries() if mount.kind in ("cgroup", "cgroup2")]
        on_v1 = {name for group in groups for name in group.controllers}
        if on_v1.issuperset(REQUIRED):
            return _claim_v1(groups, mounts, root)
        if on_v1.isdisjoint(REQUIRED):
            return _claim_v2(groups, mounts, root, launcher)
        raise _NoneError("memory and pids are on different versions of control groups", "boot with systemd.unified_cgroup_hierarchy=1")
    except _NoneError as error:
        why, remedy = error.args
    except OSError as error:
        if error.errno in PASSING:
            raise
        why = f"{error.filename}: {error.strerror}"
        remedy = "give this container writable control groups (systemd unit: ProtectControlGroups=no)" if error.errno == errno.EROFS else ""
    return Claim("none", "root" if root else "rootless", why=why, remedy=remedy)


def release(claim: Claim) -> None:
    """Removes what `claim` made. Groups whose last process is just dying are waited for; one that is still in use stays."""
    for directory in claim.directories.values():
        _remove_patiently(directory)
        if directory.parent.name == PREFIX:
            with contextlib.suppress(OSError):
                directory.parent.rmdir()


# ---------------------------------------------------------------- version 1


def _claim_v1(groups: list[Membership], mounts: list[mountinfo.Entry], root: bool) -> Claim:
    name, lacks, made = _name(), [], dict[str, Path]()
    parents, holder = dict[str, Path](), dict[str, str]()
    for key, controller in V1_CONTROLLERS.items():
        path = next((group.path for group in groups if controller in group.controllers), None)
        hierarchy = [mount for mount in mounts if mount.kind == "cgroup" and controller in mount.super_options]
        parent = visible(path, hierarchy) if path is not None else None
        if parent is not None and parent not in parents.values():
            parents[key] = parent
            holder[key] = key
        elif key in REQUIRED:
            raise _NoneError(f"the {controller} controller (v1) is not mounted, or not by itself", "mount it below /sys/fs/cgroup")
        elif parent is not None and key not in COUNTED:  # mounted together with another, as cpu mostly is with cpuacct
            holder[key] = next(other for other, place in parents.items() if place == parent)
        elif key in COUNTED:
            lacks.append(controller)
    for parent in parents.values():
        _remove_stale(parent)
    try:
        for key, parent in parents.items():
            if key not in COUNTED and not os.access(parent, os.W_OK):
                holder = {held: by for held, by in holder.items() if by != key}
                continue
            made[key] = _make(parent / name)
            _inherit_cpuset(made[key])
    except OSError as error:
        release(Claim("v1", "root", made))
        if root:
            raise
        remedy = "run as root, or boot with cgroup v2: v1 cannot be delegated safely"
        raise _NoneError(f"{Path(error.filename).parent}: {error.strerror}", remedy) from None
    why = f"no {', '.join(lacks)} controller: processor time of unwaited processes is not counted" if lacks else ""
    swap, tcp = ((made["memory"] / f"memory.{kind}.limit_in_bytes").exists() for kind in ("memsw", "kmem.tcp"))
    quota, cpuset = holder.get("quota", ""), holder.get("cpuset", "")
    processors = _read_line(made[cpuset] / "cpuset.cpus") if cpuset else ""
    if quota and not (made[quota] / "cpu.cfs_quota_us").exists():  # CONFIG_CFS_BANDWIDTH
        quota = ""
    return Claim("v1", "root" if root else "delegated", made, why, "", swap, tcp, quota, cpuset if processors else "", processors)


def _inherit_cpuset(directory: Path) -> None:
    """Where cpuset shares the hierarchy a new group has no processors at all, and takes no process."""
    if (directory / "cpuset.cpus").exists():
        for file in ("cpuset.cpus", "cpuset.mems"):
            (directory / file).write_text((directory.parent / file).read_text())
        (directory / "cgroup.clone_children").write_text("1")


# ---------------------------------------------------------------- version 2


def _claim_v2(groups: list[Membership], mounts: list[mountinfo.Entry], root: bool, launcher: int) -> Claim:
    # systemd mounts single files of a group over a read-only hierarchy: ProtectControlGroups=.
    mounts = [mount for mount in mounts if mount.kind == "cgroup2" and os.path.isdir(mount.target)]
    if not mounts:
        raise _NoneError("no cgroup file system is mounted", "mount -t cgroup2 none /sys/fs/cgroup")
    own, why, remedy = _own(groups, mounts), "", ""
    base = _delegated(own, root) if own else None
    if base is None and root:
        base = _make_base(Path(min(mounts, key=lambda mount: mount.read_only).target))
        service = next((group.name for group in _to_unit(own) if group.suffix == ".service"), "") if own else ""
        if service:
            why, remedy = f"jails are outside of the limits of {service}", "Delegate=yes in the unit"
    else:
        base = base or _scope(own, mounts, launcher)
        _vacate(base)
    _remove_stale(base)
    _hand_on(base)
    unified = _make(base / _name())
    try:
        _hand_on(unified)
    except (OSError, _NoneError):
        unified.rmdir()
        raise
    swap = (unified / "memory.swap.max").exists()
    quota = "unified" if (unified / "cpu.max").exists() else ""
    processors = _read_line(unified / "cpuset.cpus.effective")
    cpuset = "unified" if processors else ""
    return Claim(
        "v2",
        "root" if root else "delegated",
        {"unified": unified},
        why,
        remedy,
        swap,
        quota=quota,
        cpuset=cpuset,
        processors=processors,
        disks=_disks(unified),
    )


def _disks(unified: Path) -> tuple[str, ...]:
    """Whole ones that hold something; of a part of one the kernel takes no number. Asked by a limit that is none."""
    limits, found = unified / "io.max", []
    for disk in Path("/sys/block").iterdir() if limits.exists() else ():
        if _read_line(disk / "size") not in ("", "0"):
            with contextlib.suppress(OSError):
                number = _read_line(disk / "dev")
                limits.write_text(f"{number} rbps=max wbps=max")
                found.append(number)
    return tuple(sorted(found))


def _read_line(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _own(groups: list[Membership], mounts: list[mountinfo.Entry]) -> Path | None:
    return visible(next((group.path for group in groups if not group.controllers), ""), mounts)


def _scope(own: Path | None, mounts: list[mountinfo.Entry], launcher: int) -> Path:
    """The group of a scope that holds the launcher and nothing else."""
    why = f"our control group {own or '(not visible)'} is not delegated to us"
    if not launcher:
        raise _NoneError(why, DELEGATE)
    from . import scope

    try:
        scope.ask(launcher)
    except scope.RefusedError as error:
        refused, remedy = error.args
        raise _NoneError(f"{why}, and {refused}", remedy) from None
    made = _own(memberships(Path(f"/proc/{launcher}/cgroup").read_text(errors="surrogateescape")), mounts)
    if made is None:
        raise _NoneError(f"{why}, and the scope of the launcher cannot be seen", DELEGATE)
    return made


def _delegated(own: Path, root: bool) -> Path | None:
    """The group that is ours with all below it: our own, or one around it, where an earlier claim has moved us to its leaf, or systemd has
    put us below it (DelegateSubgroup=)."""
    near = (own.parent, own) if own.name == LEAF else (own,)
    for group in _to_unit(own):
        given = _is_marked(group) or (not root and _of_a_manager(group) and _handed_over(group))
        if given and _is_writable(group) and (group in near or _lineage_only(group)):
            return group
    if root:
        return None  # everything is writable: nothing but a mark tells
    return next((group for group in near if _is_writable(group) and not _of_a_manager(group) and _lineage_only(group)), None)


def _to_unit(own: Path) -> Iterator[Path]:
    """Our group and those around it, to the unit that we are in. What lies around that is its manager's, and marked as that."""
    for group in (own, *own.parents):
        if group.name.startswith("user@"):
            return
        yield group
        if _is_unit(group):
            return


def _is_unit(group: Path) -> bool:
    return group.suffix in (".service", ".scope", ".slice")


def _is_marked(group: Path) -> bool:
    """Whether systemd has handed it over."""
    return any(_attribute(group, name) == b"1" for name in ("user.delegate", "trusted.delegate"))


def _is_writable(group: Path) -> bool:
    return all(os.access(group / file, os.W_OK) for file in ("cgroup.procs", "cgroup.subtree_control", "."))


def _handed_over(unit: Path) -> bool:
    from . import scope

    return scope.delegates(unit.name)


def _of_a_manager(group: Path) -> bool:
    """A unit of a user's manager: it belongs to the user, but to the manager in the first place."""
    return _is_unit(group) and any(part.startswith("user@") for part in group.parts)


def _attribute(path: Path, name: str) -> bytes:
    try:
        return os.getxattr(path, name)
    except OSError:
        return b""


def _lineage_only(group: Path) -> bool:
    """Whether no process in the group is a stranger: all are us, what started us there, or what those started."""
    parents = {pid: _parent(pid) for pid in _processes(group)}
    first = os.getpid()
    while parents.get(first) in parents:
        first = parents[first]
    ours = {first}
    while new := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= new
    return ours.issuperset(parents)


def _processes(group: Path) -> list[int]:
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # what cannot be read for another reason is not gone
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _vacate(group: Path) -> None:
    """Moves the group's processes to its leaf. One that forks meanwhile leaves a child behind: look again."""
    for _ in range(TRIES):
        processes = _processes(group)
        if not processes:
            return
        leaf = group / LEAF
        leaf.mkdir(exist_ok=True)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(str(pid))
    raise _NoneError(
        f"{group} does not become empty: its processes cannot be moved to {LEAF}", "run in a group of its own, with Delegate=yes"
    )


def _make_base(top: Path) -> Path:
    """The group of all root's launchers, below the root of what is visible of the hierarchy."""
    _hand_on(top)
    base = top / PREFIX
    base.mkdir(mode=0o755, exist_ok=True)
    return base


def _hand_on(group: Path) -> None:
    """Makes the controllers available to the groups below. They must have been handed to this one."""
    have = (group / "cgroup.controllers").read_text().split()
    lacks = [name for name in REQUIRED if name not in have]
    if lacks:
        raise _NoneError(
            f"{group} has no {' and no '.join(lacks)} controller",
            f"for a user, put `[Service]` and `Delegate=cpu memory pids` into "
            f"/etc/systemd/system/user@.service.d/delegate.conf, run systemctl daemon-reload, log in again, then {DELEGATE}",
        )
    control = group / "cgroup.subtree_control"
    given = control.read_text().split()
    try:
        if missing := [name for name in REQUIRED if name not in given]:
            control.write_text(" ".join(f"+{name}" for name in missing))
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise _NoneError(f"{control}: {error.strerror}", "run in a group of its own, with Delegate=yes") from None
    for name in WANTED:
        if name in have and name not in given:
            try:
                control.write_text(f"+{name}")
            except OSError as error:  # then the claim has no file of it
                if error.errno in PASSING:
                    raise


# ---------------------------------------------------------------- directories


def _name() -> str:
    """Says whose it is, so that it can be told when its owner is dead, also when its number was given to another process since."""
    return f"{PREFIX}.{os.getpid()}.{_start(os.getpid())}.{_view()}.{os.urandom(4).hex()}"


def _start(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _view() -> str:
    """Where process numbers and times of start mean the same: a time namespace shifts those in /proc, too."""
    time = Path("/proc/self/ns/time")
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{time.stat().st_ino if time.exists() else 0}"


def _make(directory: Path) -> Path:
    for _ in range(TRIES):
        try:
            directory.mkdir(mode=0o755)
        except FileNotFoundError:  # somebody else's release has just removed the empty parent
            directory.parent.mkdir(mode=0o755, exist_ok=True)
            if directory.parent.name == PREFIX:
                _hand_on(directory.parent)
            continue
        return directory
    raise FileNotFoundError(2, os.strerror(2), str(directory))


def _remove(directory: Path) -> bool:
    """Removes a directory of ours and the cells below it, if we may. False while there is a process in one."""
    try:
        for cell in directory.iterdir():
            if cell.name.startswith("cell-") and cell.is_dir():
                cell.rmdir()
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:  # any other than EBUSY lasts: we have given up root, say
        return error.errno != errno.EBUSY
    return True


def _remove_patiently(directory: Path) -> None:
    for _ in range(TRIES):
        if _remove(directory):
            return
        time.sleep(PAUSE)


def _remove_stale(parent: Path) -> None:
    """Directories that a dead caller left behind. Only what has our name, and a process number that we can judge. In them may be jails of a
    launcher that somebody has stopped, so that it did not see the caller's end: nobody keeps their limits of time. cgroups(7)"""
    for directory in parent.glob(f"{PREFIX}.*"):
        words = directory.name.split(".")
        if len(words) == 5 and words[1].isdigit() and words[3] == _view() and _start(int(words[1])) != words[2]:
            kills = list(directory.glob("cell-*/cgroup.kill"))  # version 2, from Linux 5.14 on
            for kill in kills:
                with contextlib.suppress(OSError):
                    kill.write_text("1")
            (_remove_patiently if kills else _remove)(directory)
