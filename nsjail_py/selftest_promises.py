"""What `nsjail-py selftest` checks, as a table: each promise, the attack on it, and the layers that keep it, first the one that answers.

A promise is made by a policy that asks for at least one of its layers. The attack's name is that of a function in selftest_probe.py, of a
run in selftest.py (TRIALS), or of something that the host looks at after the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import syscalls
from .policy import Policy
from .rootfs import is_below

Call = tuple[str, *tuple[int, ...]]
"""A system call and its first arguments."""
CLONE_NEWUSER, CLONE_NEWUTS = 0x10000000, 0x04000000
SIGCHLD = 17
RLIMIT_CORE = 4


class Layer(NamedTuple):
    """One wall."""

    name: str
    asked: Callable[[Policy], bool] = lambda _: True
    """Whether a policy has it."""
    protection: str = ""
    """The result's name for it (Result.protections), where a host may not be able to give it."""


class Promise(NamedTuple):
    attack: str
    area: str
    text: str
    layers: tuple[Layer, ...]


def permits(policy: Policy, call: str, *arguments: int) -> bool:
    """Whether the filter lets a call with these arguments through; arguments that are not given are 0."""
    if policy.syscalls is None:
        return True
    if call in syscalls._tables()["absent"]["calls"]:
        return False
    padded = (*arguments, 0, 0, 0, 0, 0, 0)
    alternatives = syscalls._rules(policy.syscalls).get(call, set())
    return any(all(padded[number] & mask == value for number, mask, value in alternative) for alternative in alternatives)


def refused(*calls: Call) -> Layer:
    """The filter, where it refuses every one of these calls."""
    return Layer("system call filter", lambda policy: not any(permits(policy, *call) for call in calls))


def namespace(kind: str, name: str) -> Layer:
    return Layer(name, lambda policy: kind in policy.namespaces)


def limit(name: str, layer: str, protection: str = "") -> Layer:
    return Layer(layer, lambda policy: getattr(policy.limits, name) is not None, protection)


def hides(policy: Policy, path: str) -> bool:
    """Whether nothing that the policy shows contains a path of the host."""
    shown = [mount.source for mount in policy.mounts] + [place for place in (policy.workdir, policy.python.project) if place]
    if policy.root not in ("minimal", "system"):
        shown.append("/" if policy.root == "host" else policy.root)
    return not any(is_below(path, top) for top in shown)


FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "calls-tracing": (
        "no tracing, no other process's memory or descriptors",
        ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "process_madvise"),
    ),
    "calls-io-uring": ("no io_uring", ("io_uring_setup", "io_uring_enter", "io_uring_register")),
    "calls-kernel-programs": ("no programs in the kernel, no page faults handled", ("bpf", "perf_event_open", "userfaultfd")),
    "calls-keyrings": ("no keyrings", ("keyctl", "add_key", "request_key")),
    "calls-mounts": ("no calls about mounts", ("fsconfig", "fsmount", "move_mount", "mount_setattr", "umount2")),
    "calls-namespaces": ("no calls about namespaces", ("unshare", "setns")),
    "calls-file-handles": ("no file handles", ("name_to_handle_at", "open_by_handle_at")),
    "calls-kernel-itself": (
        "no calls about the kernel itself: log, modules, quota, swap, ports",
        ("syslog", "quotactl", "swapon", "iopl", "init_module", "finit_module", "kexec_load"),
    ),
    "calls-clocks": ("no clock can be set", ("clock_settime", "clock_adjtime", "adjtimex")),
    "calls-memory-tricks": ("no rare calls about memory", ("vmsplice", "remap_file_pages", "move_pages", "memfd_secret")),
    "calls-own-filter": ("no system call filter of its own", ("seccomp",)),
}
"""Families of system calls, each made as a call that fails for another reason, or not at all, where no filter refuses it."""


def family_layer(name: str) -> Layer:
    return Layer("system call filter", lambda policy: any(not permits(policy, call, -1) for call in FAMILIES[name][1]))


def promises(canary: str, variable: str) -> list[Promise]:
    """All of them, in the order in which they are tried and shown. canary: the host's file; variable: the caller's variable."""
    pids = Layer("PID namespace")
    caps = Layer("no capabilities")
    own_uid = Layer("user id of its own", lambda policy: policy.own_uid, "own_uid")
    own_keys = Layer("session keyring of its own")
    no_fork = refused(("fork",), ("clone", SIGCHLD))
    odd = refused(("socket", 16, 3), ("socket", 38, 5), ("socket", 40, 1))
    typing = refused(("ioctl", 0, 0x5412), ("ioctl", 0, 0x541C))
    ends = Layer("system call filter", lambda policy: policy.syscalls is not None and policy.syscalls.on_denied == "kill")
    view = Layer("file system view", lambda policy: hides(policy, canary))
    net = namespace("net", "network namespace")
    ipc = namespace("ipc", "IPC namespace")
    landlock = Layer("Landlock", lambda policy: policy.landlock)
    unix, tcp = refused(("socket", 1, 1)), refused(("socket", 2, 1))
    new_user = refused(("clone", CLONE_NEWUSER | SIGCHLD), ("unshare", CLONE_NEWUSER))
    no_nesting = Layer("max_user_namespaces = 0", lambda policy: not policy.nested_userns, "nested_userns")
    core_limit = refused(("setrlimit", RLIMIT_CORE), ("prlimit64", 0, RLIMIT_CORE, 1))
    private = Layer("private /tmp and /dev/shm")
    own_environment = Layer("environment of its own", lambda policy: variable not in policy.env_pass and variable not in policy.env)
    filtered = Layer("system call filter", lambda policy: policy.syscalls is not None)
    table: dict[str, dict[str, tuple[str, tuple[Layer, ...]]]] = {
        "environment": {
            "unknown-call": ("a system call that nobody knows does not reach the kernel", (filtered,)),
            "environment": ("no variable of the caller's is seen", (own_environment,)),
            "environment-of-others": ("no other process's environment can be read", (pids, Layer("launcher without environment"))),
            "descriptors": ("no descriptor of the caller's is open but the three standard ones", (Layer("descriptors closed"),)),
            "host-name": ("it does not learn the host's name", (namespace("uts", "UTS namespace"),)),
            "control-group-path": ("it does not learn its place among the control groups", (namespace("cgroup", "cgroup namespace"),)),
        },
        "files": {
            "host-file": ("a file of the host cannot be read, by whatever path", (view,)),
            "host-file-by-other-processes": ("no process's root, directory or descriptor leads to a file of the host", (pids,)),
            "host-secret": ("a file that only the caller may read cannot be read", (view, own_uid)),
            "host-tmp": ("the host's /tmp is not seen", (private,)),
            "host-shm": ("the host's /dev/shm is not seen", (private,)),
            "file-handle": ("no file is opened by its handle", (refused(("name_to_handle_at",)), caps)),
            "write-outside": ("nothing can be made outside /work, /tmp and /dev/shm", (Layer("read-only root"),)),
            "mount-flags": ("every mount is nosuid and nodev, and read-only where it is not its own", (Layer("mount flags, recursive"),)),
            "execute-written": ("what it wrote cannot be mapped as code", (Layer("noexec", lambda p: not p.exec_in_writable),)),
            "set-user-id-file": ("no set-user-id file can be made", (refused(("chmod", 0, 0o4755), ("fchmodat", 0, 0, 0o4755)),)),
            "make-device": ("no device node can be made", (refused(("mknod", 0, 0o020600), ("mknodat", 0, 0, 0o020600)), caps)),
            "devices": ("there is no device but null, zero, full, random and urandom", (Layer("private /dev"),)),
            "proc-secrets": ("/proc tells nothing about the kernel", (Layer("own or masked /proc"),)),
            "proc-settings": ("/proc/sys cannot be opened for writing", (Layer("own or read-only /proc"),)),
            "control-groups": ("no control group of the host can be joined", (Layer("file system view or read-only root"),)),
        },
        "mounts": {
            "mount": ("nothing can be mounted", (refused(("mount",)), caps)),
            "remount": ("no mount can be changed", (refused(("mount",)), caps)),
            "unmount": ("nothing can be unmounted", (refused(("umount2",)), caps)),
            "mount-by-descriptor": ("no mount can be made by fsopen or open_tree", (refused(("fsopen",), ("open_tree",)), caps)),
            "change-root": ("the root cannot be changed", (refused(("pivot_root",), ("chroot",)), caps)),
            "join-namespace": ("no namespace can be joined", (refused(("setns",)), caps)),
        },
        "processes": {
            "see-processes": ("a process of the host is not seen", (pids,)),
            "signal-outside": ("a process of the host gets no signal", (pids,)),
            "process-group": ("its session and process group are not the caller's", (Layer("session of its own"),)),
            "trace-outside": ("a process of the host cannot be traced", (refused(("ptrace",)), pids)),
            "priority-outside": ("a process of the host keeps its priority", (refused(("setpriority",)), pids)),
            "limits-outside": ("a process of the host keeps its limits", (refused(("prlimit64", 4321)), pids)),
            "init-memory": ("the jail's first process shows neither memory nor environment", (Layer("init is not dumpable"),)),
            "new-process": ("no process can be started", (no_fork,)),
            "new-program": ("no further program can be executed", (refused(("execve",)),)),
        },
        "network": {
            "tcp-to-host": ("a TCP server on the host's loopback is not reached", (tcp, net, landlock._replace(protection="landlock_net"))),
            "udp-to-host": ("a UDP socket on the host's loopback gets nothing", (refused(("socket", 2, 2)), net)),
            "route": ("there is no way to any network", (refused(("socket", 2, 2)), net)),
            "abstract-socket": (
                "an abstract socket of the host is not reached",
                (unix, net, landlock._replace(protection="landlock_scope")),
            ),
            "path-socket": ("a socket file of the host is not reached", (unix, view)),
            "raw-socket": ("no raw or packet socket can be made", (refused(("socket", 2, 3, 1), ("socket", 17, 3)), caps)),
            "odd-sockets": ("no netlink, crypto or VM socket can be made", (odd,)),
        },
        "shared objects": {
            "shared-memory": ("System V memory of the host is not found", (refused(("shmget",)), ipc)),
            "semaphores": ("System V semaphores of the host are not found", (refused(("semget",)), ipc)),
            "message-queue": ("a System V queue of the host is not found", (refused(("msgget",)), ipc)),
            "posix-queue": ("a POSIX queue of the host is not found", (refused(("mq_open",)), ipc)),
            "session-keyring": ("a key in the caller's session keyring is not found", (refused(("keyctl",)), own_keys)),
            "user-keyring": ("a key in the caller's user keyring is not found", (refused(("keyctl",)), Layer("user namespace"))),
        },
        "privileges": {
            "capabilities": ("it has no capability, and can get none", (caps,)),
            "new-privileges": ("executing gives no privilege", (Layer("no_new_privs"),)),
            "become-root": ("it cannot become root", (refused(("setresuid",)), Layer("user namespace"))),
            "root-mapped": ("the host's root has no name inside", (Layer("user namespace"),)),
            "own-uid": ("its user id on the host belongs to nobody else", (own_uid,)),
            "groups": ("it is in no group of the caller's", (Layer("groups cleared", protection="groups"),)),
            "join-group": ("it can join no group", (refused(("setgroups",)), caps)),
        },
        "system calls": {
            **{name: (sentence, (family_layer(name),)) for name, (sentence, _) in FAMILIES.items()},
            "terminal-input": ("nothing can be typed into a terminal (TIOCSTI, TIOCLINUX)", (typing,)),
            "dangerous-prctl": ("prctl does harmless things only", (refused(("prctl", 27), ("prctl", 52)),)),
            "unreadable-flags": ("clone3 and openat2 seem not to exist", (filtered,)),
            "x32": ("a call of the x32 table ends the run", (filtered,)),
            "i386": ("a call of the 32-bit table (int 0x80) ends the run", (filtered,)),
            "denied-ends": ("the first refused call ends the run", (ends,)),
        },
        "limits": {
            "too-many-files-open": ("descriptors are limited", (limit("open_files", "resource limits"),)),
            "too-large-a-file": ("the size of a file is limited", (limit("file_size", "resource limits"),)),
            "too-much-disk": ("what it writes is limited", (limit("disk", "tmpfs size"),)),
            "too-many-files": ("how many files it makes is limited", (limit("files", "tmpfs inodes"),)),
            "too-many-threads": ("processes and threads are limited", (limit("processes", "control group or resource limits"),)),
            "core-dumps": ("it leaves no core dump", (Layer("resource limits"),)),
            "core-helper": ("a crash starts no program of the host for a core dump", (core_limit,)),
            "memory": ("memory is limited", (limit("memory", "control group or resource limits"),)),
            "memory-together": ("memory and files are limited together", (limit("memory", "control group", "cgroup"),)),
            "cpu-time": ("processor time is limited", (limit("cpu_time", "clocks"),)),
            "wall-time": ("time is limited", (limit("wall_time", "clocks"),)),
            "idle-time": ("doing nothing is limited", (limit("idle_time", "clocks"),)),
            "output": ("output is limited", (limit("output", "caller's reader"),)),
        },
        "clean-up": {
            "left-processes": ("no process outlives its run", (no_fork, pids)),
            "left-files": ("no file outlives its run", (Layer("new tmpfs for each run", lambda p: p.workdir is None),)),
            "left-memory": ("no shared memory outlives its run", (refused(("shmget",)), ipc)),
            "left-on-host": ("no mount, control group, descriptor or process stays on the host", (Layer("launcher"),)),
            "dead-caller": ("a run ends with its caller", (Layer("launcher's watch on the caller"),)),
        },
        # What changes the probe for good comes last.
        "namespaces": {
            "new-uts-namespace": ("no namespace can be made", (refused(("unshare", CLONE_NEWUTS)), caps)),
            "user-namespace": ("no user namespace can be made", (new_user, no_nesting)),
        },
    }  # fmt: skip
    return [Promise(attack, area, text, layers) for area, rows in table.items() for attack, (text, layers) in rows.items()]
