"""What a jail allows: the frozen `Policy`, written by people, compiled into a plan for one host.

A policy is plain data: comparing, hashing and printing it mean what they say. It can be written as a TOML file
(`policyfile.load`) or built here; both are checked by the same rules. Sizes are bytes, times are seconds, `None` is no limit.
"""

from __future__ import annotations

import sys
from typing import Literal

import msgspec

from .prepared import prepared

Namespace = Literal["user", "mount", "pid", "net", "ipc", "uts", "cgroup", "time"]
BestEffort = Literal[
    "own_uid", "groups", "cgroup", "swap", "landlock_net", "landlock_scope", "nested_userns", "apparmor", "selinux", "cpus", "cpuset", "io"
]


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A frozen record whose unknown fields are errors."""


class Limits(Struct, frozen=True, kw_only=True):
    """How much of each resource one run may use. Reaching one ends the run, and the verdict names it; `cpus`, `cpuset` and `io` slow it."""

    wall_time: float | None = 60.0
    """Seconds from the start of the program to its end, whatever it does meanwhile."""
    cpu_time: float | None = 30.0
    """Seconds of processor time, user and system, of all its processes and threads together."""
    idle_time: float | None = None
    """Seconds that the run may go on without using the processor at all."""
    cpus: float | None = None
    """Processors that all its processes and threads together may keep busy: with 1.5 they get 150 ms of processor time in each 100 ms, then
    they wait (cpu.max, or cfs_quota_us of version 1). Only where there is a control group with the cpu controller."""
    cpuset: str | None = None
    """Processors that it may run on, by their numbers: `"0-1,4"` (cpuset.cpus; cpuset(7)). It cannot leave them by sched_setaffinity. Only
    where there is a control group with the cpuset controller, and all of them are ours."""
    io: int | None = None
    """Bytes a second that all its processes together may read from each disk, and as many that they may write to it; beyond that they wait
    (io.max; at least 1 MiB). Of the disks that there are when the first run begins; what is in the host's cache is free. Only where there
    is a control group of version 2 with the io controller."""
    memory: int | None = 512 * 1024**2
    """Bytes of memory of all processes together, files in /work, /tmp and /dev/shm included; swap counts as memory.
    Where the host gives no cgroup, and the result says so: bytes of private memory of each process (RLIMIT_DATA), and of mapped memory of
    all of them together, looked at so often that no more than some 10 ms of filling goes beyond it; where looking is dear (many processes,
    a slow machine), ten times as long as a look takes, and at most a second."""
    processes: int | None = 64
    """Processes and threads alive at one time."""
    open_files: int | None = 256
    """File descriptors open in one process (RLIMIT_NOFILE)."""
    file_size: int | None = None
    """Bytes in one written file (RLIMIT_FSIZE), also in a file of the caller's that is a standard stream."""
    disk: int | None = 64 * 1024**2
    """Bytes in /work, /tmp and /dev/shm together (one tmpfs; it is memory, and counts there too). What the policy shows writable of the
    host is not among them: a file system of its own, or a quota, limits that."""
    files: int | None = 65536
    """Files and directories in /work, /tmp and /dev/shm together (inodes of that tmpfs)."""
    output: int | None = 16 * 1024**2
    """Bytes written to standard output and standard error together, when the caller reads them."""
    stack: int | None = 8 * 1024**2
    """Bytes of the main thread's stack (RLIMIT_STACK)."""


class Mount(Struct, frozen=True, kw_only=True):
    """One file or directory of the host that is visible inside."""

    source: str
    """Absolute path on the host."""
    target: str
    """Absolute path inside; it must not collide with another target."""
    writable: bool = False
    """Whether the program may change it. Permission bits still count: inside it runs as its own user."""
    executable: bool = True
    """Whether programs in it may be executed and its libraries mapped (mount option noexec when false)."""


class Syscalls(Struct, frozen=True, kw_only=True):
    """Which system calls the program may make: an allow-list of named sets from syscalls.toml."""

    allow: tuple[str, ...] = ()
    """Names of sets (`@files`) or of single system calls (`getcpu`)."""
    deny: tuple[str, ...] = ()
    """Names taken out again."""
    on_denied: Literal["errno", "kill"] = "errno"
    """`errno`: the call fails with EPERM, is counted, and the program goes on. `kill`: the first one ends the run."""
    exec: bool = True
    """Whether the program may execute further programs once it runs."""


class Python(Struct, frozen=True, kw_only=True):
    """How Python scripts are run."""

    interpreter: str | None = None
    """Absolute path of the interpreter; by default the one that runs nsjail_py."""
    imports: tuple[str, ...] = ()
    """Installed distributions visible inside, with what they depend on; and modules of the standard library, where that is to be no more
    than is needed (`stdlib`)."""
    stdlib: Literal["auto", "whole", "needed"] = "auto"
    """How much of the standard library is visible, in a minimal root. `needed`: what the interpreter loads to start, the modules that
    `imports` lists, and what they and the distributions import; the error of any other names the line to change (layers.md). `auto`:
    `needed` where `imports` lists a module of the standard library (`["numpy", "json"]`), and `whole` otherwise."""
    without: tuple[str, ...] = ()
    """Modules of the standard library that are not visible inside, in a minimal root (`["ctypes", "socket"]`). Those that are built into
    the interpreter cannot be left out; neither can those that it needs to start."""
    project: str | None = None
    """Directory of the host shown read-only at /project and put on sys.path."""
    aslr: Literal["shared", "fresh"] = "shared"
    """The layout of the address space. `shared`: the runs that are forked from one warm interpreter have the same. `fresh`: each run
    executes an interpreter of its own, also where a Jail has `preload`."""
    scan: Literal["off", "warn", "refuse"] = "off"
    """What is done before the start about what a script's text shows (layers.md): nothing, a warning for each finding, or a refusal of
    scripts with findings of high or medium severity. It costs one more jail, some 50 ms."""
    audit: Literal["off", "report", "refuse"] = "off"
    """Whether a script's interpreter tells what it imports, opens, connects to and starts (audit.md): `report` puts it into the result;
    `refuse` also raises PermissionError, naming the line to change, where the filter would refuse without a word. Not for a warm one."""
    scan_ignore: tuple[str, ...] = ()
    """Names of rules that the scan leaves out."""

    @property
    def whole(self) -> bool:
        """Whether a minimal root has all of the standard library."""
        return self.stdlib == "whole" or (self.stdlib == "auto" and sys.stdlib_module_names.isdisjoint(self.imports))


@prepared
class Policy(Struct, frozen=True, kw_only=True):
    """What a jail allows. `nsjail_py.policy("untrusted")` gives a shipped one; `msgspec.structs.replace` changes a copy."""

    name: str = "custom"
    """The name that reports show."""
    description: str = ""
    """One sentence for `policy list`."""
    root: str = "minimal"
    """The file system inside. `minimal`: only the program, its shared libraries, for Python its standard library and the listed
    distributions; no shell. `system`: the host's /usr, read-only, and of its /etc only `alternatives` and `ld.so.cache`. `host`: every
    directory of the host, read-only. Or the absolute path of a directory that holds a root file system; or `oci:PATH[:TAG]`, a container
    image: an OCI image layout, or the archive that `docker save` wrote. Programs are those of the image then."""
    backend: str = "native"
    """Who makes the jail. `native`: our own launcher. `oci:NAME`: an installed OCI runtime (`crun`, `runc`, `runsc`), by name or absolute
    path, with the same view and limits as far as it can (oci.md); what it cannot give and the policy requires is an error."""
    mounts: tuple[Mount, ...] = ()
    """What else of the host is visible."""
    proc: Literal["pid", "masked", "none"] = "pid"
    """/proc inside. `pid`: its own processes only. `masked`: the whole, with the dangerous files hidden. `none`: no /proc."""
    workdir: str | None = None
    """Directory of the host that is /work inside, writable and kept. By default /work is new, empty and thrown away. One that is root's is,
    for a run of root's, given to an id that no run has; the directories that a system is made of are refused."""
    exec_in_writable: bool = False
    """Whether files that the program wrote itself (in /work, /tmp) may be executed."""
    namespaces: tuple[Namespace, ...] = ("user", "mount", "pid", "net", "ipc", "uts", "cgroup")
    """What is its own, of `user`, `mount`, `pid`, `net`, `ipc`, `uts`, `cgroup` and `time`. `user`, `mount` and `pid` are always made:
    without them nothing could be cleaned up for certain."""
    loopback: bool = False
    """Whether the loopback interface of its own network is up."""
    own_uid: bool = True
    """Whether each run must have a user id that nothing else on the host has. Started by root it always has one; an ordinary user has
    only his own to give, so this is an error there unless `best_effort` lists it."""
    nested_userns: bool = False
    """Whether the program may make user namespaces, and in them jails of its own: ours, bubblewrap's, a browser's. For code that you trust:
    it reaches much more of the kernel then, and what it mounts counts as `memory` only (so there must be a control group), not as `disk`.
    It needs `landlock = false`, and no `[syscalls]`. For a /proc of their own, jails inside need `proc = "pid"`; those of an ordinary user
    get no cgroup namespace of theirs."""
    syscalls: Syscalls | None = None
    """The system call filter; none when absent."""
    landlock: bool = True
    """Whether Landlock repeats the file system view, and refuses TCP and abstract sockets, in a second layer that no mount can undo."""
    apparmor: str | None = None
    """Name of an AppArmor profile that the program gets when it is executed; it must be loaded. apparmor.d(5)"""
    selinux: str | None = None
    """SELinux context that the program gets when it is executed (`user:role:type:level`); the caller's domain must be allowed to change to
    it, also under no_new_privs (nnp_transition). selinux(8)"""
    env: dict[str, str] = {}
    """Environment variables set inside, besides PATH, HOME, LANG, USER and TMPDIR."""
    env_pass: tuple[str, ...] = ()
    """Names of the caller's variables that are passed on when they are set. Nothing else of his environment crosses."""
    hostname: str = "jail"
    """Host name inside."""
    limits: Limits = Limits()
    """How much it may use."""
    python: Python = Python()
    """How Python scripts are run."""
    best_effort: tuple[BestEffort, ...] = ()
    """Protections that may be missing where the host cannot give them, of `own_uid`, `groups`, `cgroup`, `swap`, `landlock_net`,
    `landlock_scope`, `nested_userns`, `apparmor`, `selinux`, `cpus`, `cpuset` and `io`. The result lists each as unavailable, with the
    reason; every other protection that cannot be had is an error."""

    def __hash__(self) -> int:
        values = msgspec.structs.astuple(self)
        try:
            return hash((values[:ENV], values[ENV + 1 :], frozenset(self.env.items())))
        except TypeError:  # somebody has given a list for a tuple, which equals no tuple
            return hash((self.name, self.limits))


ENV = Policy.__struct_fields__.index("env")
"""The one field that has no hash."""
