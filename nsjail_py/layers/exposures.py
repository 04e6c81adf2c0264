"""The exposures that a posture has a row for: what a program in the jail could reach, what keeps it from that, and what is left.

Each row of EXPOSURES has a function that looks at the policy and at what this host gave, and answers with a `Judgement`. `badness` is 0
(closed) to 1 (open); the two numbers before the function say how much of it may be left to code of moderate trust, and to hostile code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nsjail_py.policy import Policy
from nsjail_py.units import format_size, format_time

CLOSED, NARROW, OPEN = 0.0, 0.5, 1.0
HOLES = {
    1: "the environment leaks secrets",
    2: "system commands",
    3: "arbitrary imports",
    4: "built-ins (open, exec, __import__ ...)",
}
"""The four holes that the project began with; README.md."""


class Judgement(NamedTuple):
    """What one exposure comes to under a policy."""

    badness: float
    enforced: str
    """What keeps the program from it; empty where nothing does."""
    residual: str
    """What it can do all the same."""
    change: str = ""
    """The line of the policy, or the change of the host, that would close it further."""


class Facts(NamedTuple):
    """What is judged."""

    policy: Policy
    states: dict[str, str]
    """Protection -> applied, unavailable, not requested; as in a Result."""
    reasons: dict[str, str]
    calls: frozenset[str] | None
    """System calls that the filter lets pass; None: there is no filter."""

    def on(self, name: str) -> bool:
        return self.states.get(name) == "applied"

    def may(self, call: str) -> bool:
        return self.calls is None or call in self.calls

    @property
    def executes(self) -> bool:
        """Whether it may start another program once it runs."""
        return self.policy.syscalls is None or self.policy.syscalls.exec


class Exposure(NamedTuple):
    """One row."""

    name: str
    weight: int
    """1 to 10: how much harm it does."""
    hole: int
    """Which of HOLES it belongs to; 0: none."""
    moderate: float
    """The most badness for code of moderate trust."""
    untrusted: float
    """The most badness for hostile code."""
    judge: Callable[[Facts], Judgement]


def environment(facts: Facts) -> Judgement:
    passed = facts.policy.env_pass
    enforced = "the environment is made from the policy; nothing else crosses, the launcher's own is empty"
    if passed:
        return Judgement(NARROW, enforced, f"it reads the caller's {', '.join(passed)}", "env_pass = [] and what it needs under [env]")
    return Judgement(CLOSED, enforced, "it reads what the policy itself sets under [env]")


def processes_seen(facts: Facts) -> Judgement:
    enforced = "a PID namespace, and a /proc of its own"
    if facts.policy.proc == "masked":
        left = "what /proc tells about the host and nobody masked"
        return Judgement(NARROW, f"{enforced} whose dangerous files are masked", left, 'proc = "pid"')
    return Judgement(CLOSED, enforced, "its own processes")


def files_read(facts: Facts) -> Judgement:
    policy = facts.policy
    shown = [mount.source for mount in policy.mounts] + ([policy.python.project] if policy.python.project else [])
    second = "; Landlock repeats the view" if facts.on("landlock_fs") else ""
    if policy.root == "host":
        theirs = "" if facts.on("own_uid") else ", and that is the caller's: secrets included"
        left = f"every file of the host that its user may read{theirs}"
        return Judgement(OPEN, "permission bits only", left, 'root = "minimal", and a [[mounts]] for what it needs')
    if policy.root != "minimal":
        left = f"all of {policy.root if policy.root != 'system' else '/usr'}"
        return Judgement(NARROW, f"a pivoted root{second}", left, 'root = "minimal"')
    extra = f", and {', '.join(shown)}" if shown else ""
    return Judgement(NARROW / 2 if shown else CLOSED, f"a pivoted, minimal root{second}", f"its interpreter and libraries{extra}")


def files_changed(facts: Facts) -> Judgement:
    policy = facts.policy
    writable = [mount.source for mount in policy.mounts if mount.writable] + ([policy.workdir] if policy.workdir else [])
    second = "; Landlock repeats it" if facts.on("landlock_fs") else ""
    enforced = f"read-only mounts, recursively{second}"
    if writable:
        left = f"it may change, and fill, {', '.join(writable)} of the host"
        return Judgement(NARROW, enforced, left, "mounts that are read-only, no workdir")
    return Judgement(CLOSED, enforced, "/work, /tmp and /dev/shm, which are thrown away")


def programs(facts: Facts) -> Judgement:
    if not facts.executes:
        second = "; no other program is in the root" if facts.policy.root == "minimal" else ""
        third = "; Landlock grants no execute right" if facts.on("landlock_fs") else ""
        return Judgement(CLOSED, f"exec is refused by the filter{second}{third}", "nothing: libraries can still be mapped")
    if facts.policy.root == "minimal":
        left = "its own interpreter once more, and what mounts show"
        return Judgement(NARROW, "no other program is in the root", left, "[syscalls] exec = false")
    return Judgement(OPEN, "", "every program that the root shows, shells included", '[syscalls] exec = false, root = "minimal"')


def own_programs(facts: Facts) -> Judgement:
    if facts.policy.exec_in_writable and facts.executes:
        left = "it executes what it downloads or writes, with no other rights than it has"
        return Judgement(NARROW, "", left, "exec_in_writable = false")
    second = "; Landlock grants no execute right there" if facts.on("landlock_fs") else ""
    if facts.may("memfd_create") and facts.executes:
        change = "@shared-objects out of [syscalls] allow"
        return Judgement(NARROW, f"noexec on all that is writable{second}", "a program in a memfd", change)
    return Judgement(CLOSED, f"noexec on all that is writable{second}", "code in its own memory, in the same jail")


def new_processes(facts: Facts) -> Judgement:
    if not facts.may("fork"):
        return Judgement(CLOSED, "fork and clone without CLONE_THREAD are refused by the filter", "threads")
    change = "@processes out of [syscalls] allow"
    return Judgement(NARROW, "a PID namespace whose end is the end of all", "processes, up to the limit", change)


def imports(facts: Facts) -> Judgement:
    policy = facts.policy
    if policy.root != "minimal":
        return Judgement(OPEN, "", "every package that the root shows", 'root = "minimal", and the list under [python] imports')
    listed = f", {', '.join(policy.python.imports)} and what they need" if policy.python.imports else ""
    left = f"the standard library{listed}; importing gives no right that it lacks"
    return Judgement(CLOSED, "what is not listed is not in the file system view", left)


def network(facts: Facts) -> Judgement:
    inet = facts.may("bind")
    if not facts.on("net_namespace"):
        if not inet:
            return Judgement(NARROW, "sockets are refused by the filter", "abstract sockets passed to it", 'add "net" to namespaces')
        return Judgement(OPEN, "", "the host's network, all of it, with what listens on localhost", 'add "net" to namespaces')
    layers = ["an empty network namespace"] + ([] if inet else ["sockets refused by the filter"])
    layers += ["TCP refused by Landlock"] if facts.on("landlock_net") else []
    return Judgement(CLOSED, "; ".join(layers), "a loopback of its own" if inet and facts.policy.loopback else "nothing")


def kernel_calls(facts: Facts) -> Judgement:
    change = "[syscalls] allow with fewer sets; see `nsjail-py policy show untrusted`"
    if facts.calls is None:
        return Judgement(OPEN, "no filter", "every call that the kernel lets an unprivileged user make, and the faults in them", change)
    count = len(facts.calls)
    narrow = not (facts.may("fork") or facts.may("bind") or facts.executes)
    return Judgement(
        0.2 if narrow else NARROW,
        f"an allow-list of {count} system calls, some with conditions on their arguments",
        "faults of the kernel in those calls",
        "" if narrow else change,
    )


def user(facts: Facts) -> Judgement:
    if facts.on("own_uid"):
        enforced = "a user id of its own on the host, for each run; root is never mapped"
        return Judgement(CLOSED, enforced, "files that are open to everybody, if shown")
    reason = facts.reasons.get("own_uid", "")
    if facts.policy.backend != "native":
        return Judgement(NARROW, "user ids of a runtime's containers, which nobody else has", reason, 'backend = "native"')
    change = "own_uid = true" if not reason else "run nsjail_py as a system service of root's"
    return Judgement(NARROW, "a user namespace", f"on the host it is the caller's user{f' ({reason})' if reason else ''}", change)


def groups(facts: Facts) -> Judgement:
    if facts.on("groups"):
        return Judgement(CLOSED, "no supplementary group", "nothing")
    return Judgement(NARROW, "the file system view", "files shown to it that the caller's groups may read", "run nsjail_py as root")


def rights(facts: Facts) -> Judgement:
    return Judgement(CLOSED, "five empty capability sets, locked securebits, no_new_privs, nosuid everywhere", "nothing")


def nested(facts: Facts) -> Judgement:
    if facts.policy.nested_userns:
        return Judgement(OPEN, "", "all that the kernel lets the root of a user namespace do", "nested_userns = false")
    if facts.on("nested_userns") or not facts.may("unshare"):
        return Judgement(CLOSED, "new user namespaces are refused", "nothing")
    return Judgement(NARROW, "", "it may make user namespaces, and reach more of the kernel in them", "a [syscalls] table")


def devices(facts: Facts) -> Judgement:
    return Judgement(CLOSED, "a /dev of its own with null, zero, full, random, urandom and its own terminals", "nothing")


def terminal(facts: Facts) -> Judgement:
    return Judgement(CLOSED, "a new session, pipes as standard streams; TIOCSTI and TIOCLINUX refused where there is a filter", "nothing")


def interprocess(facts: Facts) -> Judgement:
    if facts.on("ipc_namespace"):
        return Judgement(CLOSED, "an IPC namespace, a new session keyring", "objects of its own, gone with it")
    return Judgement(OPEN, "", "System V objects and queues of the host", 'add "ipc" to namespaces')


def identity(facts: Facts) -> Judgement:
    missing = [name for name in ("uts", "cgroup") if not facts.on(f"{name}_namespace")]
    if missing:
        return Judgement(NARROW, "", "the host's name, or its place among the control groups", f"add {', '.join(missing)} to namespaces")
    return Judgement(CLOSED, "own host name, own view of control groups", "the kernel's version, the machine's processors, its uptime")


def second_layer(facts: Facts) -> Judgement:
    if not facts.policy.landlock:
        return Judgement(OPEN, "", "a fault in the mounts is not caught by anything", "landlock = true")
    if not facts.on("landlock_fs"):
        return Judgement(OPEN, "", facts.reasons.get("landlock_fs", "a fault in the mounts is not caught by anything"), "a newer kernel")
    lacks = [name for name in ("landlock_fs", "landlock_net", "landlock_scope") if not facts.on(name)]
    if lacks:
        return Judgement(NARROW / 2, "Landlock, in part", "; ".join(facts.reasons.get(name, name) for name in lacks), "a newer kernel")
    return Judgement(CLOSED, "Landlock for files, TCP, abstract sockets and signals", "nothing")


def memory(facts: Facts) -> Judgement:
    limit = facts.policy.limits.memory
    if limit is None:
        return Judgement(OPEN, "", "all memory of the host", '[limits] memory = "512M"')
    if not facts.on("cgroup"):
        left = f"each of its processes may have {format_size(limit)}"
        return Judgement(NARROW, "a resource limit of each process", left, facts.reasons.get("cgroup", "") or "a control group")
    return Judgement(CLOSED, "a control group of its own", f"{format_size(limit)} of all together")


def processor(facts: Facts) -> Judgement:
    limits = facts.policy.limits
    if limits.cpu_time is None or limits.wall_time is None:
        return Judgement(OPEN, "", "it runs as long as it likes", '[limits] cpu_time = "30s", wall_time = "60s"')
    left = f"{format_time(limits.cpu_time)} of processor, {format_time(limits.wall_time)} of time"
    return Judgement(CLOSED, "clocks of the launcher", left)


def counts(facts: Facts) -> Judgement:
    limits = facts.policy.limits
    lacks = [name for name in ("processes", "open_files") if getattr(limits, name) is None]
    if lacks:
        return Judgement(OPEN, "", "it may exhaust what the kernel has of them", f"[limits] {' and '.join(lacks)}")
    enforced = "a control group, resource limits" if facts.on("cgroup") else "resource limits of each process or user"
    left = f"{limits.processes} processes, {limits.open_files} files in each"
    return Judgement(CLOSED if facts.on("cgroup") else NARROW / 2, enforced, left)


def storage(facts: Facts) -> Judgement:
    limits = facts.policy.limits
    lacks = [name for name in ("disk", "files", "output") if getattr(limits, name) is None]
    if lacks:
        return Judgement(OPEN, "", "it may fill memory, or the caller's", f"[limits] {' and '.join(lacks)}")
    return Judgement(CLOSED, "one tmpfs of limited size; output is cut", f"{format_size(limits.disk or 0)} of files")


def python_layers(facts: Facts) -> Judgement:
    how = facts.policy.python.scan
    said = "the scan warns" if how == "warn" else "the scan refuses" if how == "refuse" else "none is switched on"
    enforced = f"{said}; no layer of Python is a boundary"
    return Judgement(CLOSED, enforced, "whatever it does, it does in the jail")


def kernel_faults(facts: Facts) -> Judgement:
    return Judgement(
        NARROW,
        "fewer calls, no capabilities",
        "a fault of the kernel that an allowed call reaches; side channels of the processor",
        "a machine of its own, for an enemy who has one in hand",
    )


EXPOSURES: tuple[Exposure, ...] = (
    Exposure("the caller's environment", 8, 1, NARROW, NARROW, environment),
    Exposure("other processes", 6, 1, CLOSED, CLOSED, processes_seen),
    Exposure("other programs", 8, 2, NARROW, CLOSED, programs),
    Exposure("programs that it wrote", 6, 2, NARROW, CLOSED, own_programs),
    Exposure("new processes", 4, 2, NARROW, CLOSED, new_processes),
    Exposure("packages", 5, 3, CLOSED, CLOSED, imports),
    Exposure("network", 9, 3, CLOSED, CLOSED, network),
    Exposure("reading files of the host", 9, 4, NARROW, NARROW / 2, files_read),
    Exposure("changing files of the host", 9, 4, NARROW, NARROW, files_changed),
    Exposure("rights of its user", 7, 4, NARROW, NARROW, user),
    Exposure("groups", 3, 4, NARROW, NARROW, groups),
    Exposure("capabilities and set-user-id", 9, 0, CLOSED, CLOSED, rights),
    Exposure("system calls", 9, 0, NARROW, 0.2, kernel_calls),
    Exposure("nested namespaces", 6, 0, NARROW, CLOSED, nested),
    Exposure("devices", 7, 0, CLOSED, CLOSED, devices),
    Exposure("the caller's terminal", 5, 0, CLOSED, CLOSED, terminal),
    Exposure("shared memory and queues", 4, 0, CLOSED, CLOSED, interprocess),
    Exposure("the host's identity", 1, 0, CLOSED, CLOSED, identity),
    Exposure("a second file system layer", 4, 0, OPEN, NARROW / 2, second_layer),
    Exposure("memory", 6, 0, NARROW, NARROW, memory),
    Exposure("time", 5, 0, CLOSED, CLOSED, processor),
    Exposure("processes and descriptors", 4, 0, NARROW, NARROW, counts),
    Exposure("storage and output", 4, 0, CLOSED, CLOSED, storage),
    Exposure("layers of Python", 0, 0, OPEN, OPEN, python_layers),
    Exposure("faults of kernel and processor", 0, 0, OPEN, OPEN, kernel_faults),
)
"""Weight 0: told, and not counted, for no policy changes it."""
