"""What `nsjail-py selftest` runs inside a jail: every attack once, harmless where it succeeds. Standard library only; never imported.

Standard input is a JSON object: what to attack (selftest_canaries.py). Standard output is one, too: for each attack whether it succeeded,
and how it ended. Run outside of a jail, as root, every attack succeeds: tests/test_selftest.py does that.
"""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

ATTACKS: dict[str, Callable[[], object]] = {}
TARGET: dict[str, Any] = {}
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWUTS, CLONE_NEWNS = 0x10000000, 0x04000000, 0x00020000
PRIVATE = ("/proc", "/dev", "/tmp", "/work", "/app")


def attack(function: Callable[[], object]) -> Callable[[], object]:
    """An attack: what it returns is true where it succeeded; an OSError says how it was refused."""
    ATTACKS[function.__name__.replace("_", "-")] = function
    return function


def call(name: str, *arguments: Any) -> int:
    """A system call by its name. Raises OSError."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(TARGET["numbers"][name]), *words, *[ctypes.c_long(0)] * (6 - len(words)))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return int(result)


def read(path: str, size: int = 4096) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def any_of(tries: Iterable[Callable[[], object]]) -> object:
    """The first success of several ways. Where there is none, the last refusal counts."""
    refused = OSError(errno.ENOENT, "nothing to try")
    for attempt in tries:
        try:
            if got := attempt():
                return got
        except OSError as error:
            refused = error
    raise refused


def pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def others() -> list[str]:
    return [pid for pid in pids() if pid != str(os.getpid())]


def holds_secret(path: str) -> object:
    return TARGET["secret"].encode() in read(path, 1 << 20)


def readable(path: str) -> str:
    return path if read(path, 16) else ""


def make_socket(family: int, kind: int, protocol: int = 0) -> str:
    socket.socket(family, kind, protocol).close()
    return f"family {family}, type {kind}"


# ---------------------------------------------------------------- environment


@attack
def environment() -> object:
    return TARGET["secret"] in "\n".join(os.environ.values())


@attack
def environment_of_others() -> object:
    return any_of(partial(holds_secret, f"/proc/{pid}/environ") for pid in others())


@attack
def descriptors() -> object:
    """Anything above the three standard ones."""
    for descriptor in range(3, 1024):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            return f"descriptor {descriptor}"
    return ""


# ---------------------------------------------------------------- files


@attack
def host_file() -> object:
    path, up = TARGET["file"], "/.." * 20
    link = TARGET["scratch"] + "/link"
    os.symlink(path, link)
    places = [path, up + path, "/proc/self/root" + path, "/proc/self/cwd" + up + path, link, f"/proc/self/cwd{up}/proc/self/root{path}"]
    return any_of(partial(holds_secret, place) for place in places)


@attack
def host_file_by_other_processes() -> object:
    ways = ("root", "cwd/../../../../../../../..", "fd/3", "fd/4")
    return any_of(partial(holds_secret, f"/proc/{pid}/{way}{TARGET['file']}") for pid in others() for way in ways)


@attack
def host_secret() -> object:
    return holds_secret(TARGET["secret_file"])


@attack
def host_tmp() -> object:
    return holds_secret(TARGET["tmp_files"][0])


@attack
def host_shm() -> object:
    return holds_secret(TARGET["tmp_files"][1])


@attack
def file_handle() -> object:
    handle = ctypes.create_string_buffer(b"\x80\0\0\0", 8 + 128)
    mount = ctypes.c_int()
    call("name_to_handle_at", -100, b"/", handle, ctypes.byref(mount), 0)
    root = os.open("/", os.O_RDONLY)
    try:
        return call("open_by_handle_at", root, handle, os.O_RDONLY)
    finally:
        os.close(root)


@attack
def write_outside() -> object:
    """A directory made in each one that is not private; the promise is EROFS, not a permission that somebody forgot to give."""
    tried = ["/"] + [f"/{name}" for name in os.listdir("/") if f"/{name}" not in (*PRIVATE, *TARGET["writable"])]
    refused = OSError(errno.EROFS, "/")
    for folder in tried:
        made = f"{folder}/{TARGET['marker']}"
        try:
            os.mkdir(made)
        except NotADirectoryError:
            continue
        except OSError as error:
            if error.errno != errno.EROFS and os.access(folder, os.X_OK):
                return f"{folder} is not read-only"
            continue
        os.rmdir(made)
        return folder
    raise refused


@attack
def mount_flags() -> object:
    """A mount that honours devices or set-user-id bits, or a shown directory that is not read-only."""
    for line in read("/proc/self/mountinfo", 1 << 20).decode().splitlines():
        target, flags = line.split()[4], line.split()[5].split(",")
        own = target.startswith(PRIVATE) or target in TARGET["writable"]
        if "nosuid" not in flags or ("nodev" not in flags and not target.startswith("/dev/")) or ("ro" not in flags and not own):
            return f"{target}: {','.join(flags)}"
    return ""


@attack
def execute_written() -> object:
    path = TARGET["scratch"] + "/program"
    with open(path, "wb") as file:
        file.write(b"\xc3" * 4096)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()
    finally:
        os.close(descriptor)
    return "mapped as code"


@attack
def set_user_id_file() -> object:
    path = TARGET["scratch"] + "/setuid"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o755))
    os.chmod(path, 0o4755)
    return "chmod 4755"


@attack
def make_device() -> object:
    os.mknod(TARGET["scratch"] + "/device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    return "mknod"


@attack
def devices() -> object:
    """Device nodes beyond the few that no program can do without."""
    known = {os.makedev(1, 3), os.makedev(1, 5), os.makedev(1, 7), os.makedev(1, 8), os.makedev(1, 9)}
    for top, folders, files in os.walk("/dev"):
        folders[:] = [name for name in folders if name not in ("pts", "shm")]
        for name in files:
            seen = os.lstat(os.path.join(top, name))
            if stat.S_ISBLK(seen.st_mode) or (stat.S_ISCHR(seen.st_mode) and seen.st_rdev not in known):
                return os.path.join(top, name)
    return ""


@attack
def proc_secrets() -> object:
    names = ("interrupts", "iomem", "kallsyms", "kcore", "key-users", "keys", "kmsg", "modules", "slabinfo", "timer_list", "vmallocinfo")
    return any_of(partial(readable, f"/proc/{name}") for name in names)


@attack
def proc_settings() -> object:
    os.close(os.open("/proc/sys/kernel/hostname", os.O_WRONLY))
    return "opened for writing"


@attack
def control_groups() -> object:
    def join(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY))
        return path

    tops = ["/sys/fs/cgroup", *(entry.path for entry in os.scandir("/sys/fs/cgroup") if entry.is_dir())]
    return any_of(partial(join, f"{top}/cgroup.procs") for top in tops)


# ---------------------------------------------------------------- mounts: what root gets is never EPERM, and never changes a thing


def privileged(*harmless: Any) -> str:
    """A call that fails for want of privilege first, and for what it is asked only then."""
    try:
        call(*harmless)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            raise
        return errno.errorcode[error.errno or 0]
    return "done"


@attack
def mount() -> object:
    return privileged("mount", b"none", TARGET["scratch"].encode(), b"no-such-type", 0, None)


@attack
def remount() -> object:
    return privileged("mount", None, TARGET["scratch"].encode(), None, 0x1020, None)  # not a mount point: EINVAL


@attack
def unmount() -> object:
    return privileged("umount2", TARGET["scratch"].encode(), 0)


@attack
def mount_by_descriptor() -> object:
    return any_of([lambda: call("fsopen", b"tmpfs", 1), lambda: call("open_tree", -100, b"/", 1)])


@attack
def change_root() -> object:
    return any_of([lambda: privileged("pivot_root", b"/", b"/"), lambda: not call("chroot", b"/") and "chroot"])


@attack
def join_namespace() -> object:
    return not call("setns", call("pidfd_open", os.getpid(), 0), CLONE_NEWUTS) and "joined"


# ---------------------------------------------------------------- processes


@attack
def see_processes() -> object:
    for pid in pids():
        with contextlib.suppress(OSError):
            if TARGET["marker"].encode() in read(f"/proc/{pid}/cmdline"):
                return f"process {pid}"
    return ""


@attack
def signal_outside() -> object:
    if TARGET["pid"] != os.getpid():
        os.kill(TARGET["pid"], signal.SIGCONT)  # to a process that runs: nothing happens
    return "sent"


@attack
def process_group() -> object:
    """The caller's process group or session, which kill(0) and the terminal would reach."""
    return os.getpgrp() in (0, TARGET["group"]) or os.getsid(0) in (0, TARGET["session"])


@attack
def trace_outside() -> object:
    return not call("ptrace", 0x4206, TARGET["pid"], 0, 0) and "traced"  # PTRACE_SEIZE: it is not stopped


@attack
def priority_outside() -> object:
    os.setpriority(os.PRIO_PROCESS, TARGET["pid"], 7)
    return "changed"


@attack
def limits_outside() -> object:
    return bool(resource.prlimit(TARGET["pid"], resource.RLIMIT_NOFILE))


@attack
def init_memory() -> object:
    """In a jail the parent is its first process."""
    return any_of(partial(readable, f"/proc/{pid}/{name}") for pid in {1, os.getppid()} for name in ("environ", "mem", "maps", "fd/0"))


# ---------------------------------------------------------------- network


def connect(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> object:
    with socket.socket(family, kind) as made:
        made.settimeout(2)
        made.connect(address)
        return "connected"


@attack
def tcp_to_host() -> object:
    return connect(socket.AF_INET, ("127.0.0.1", TARGET["tcp"]))


@attack
def udp_to_host() -> object:
    """Sent; whether it came is for the host to say."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        return made.sendto(TARGET["secret"].encode(), ("127.0.0.1", TARGET["udp"]))


@attack
def route() -> object:
    return connect(socket.AF_INET, ("192.0.2.1", 9), socket.SOCK_DGRAM)  # no packet leaves: only a route is looked up


@attack
def abstract_socket() -> object:
    return connect(socket.AF_UNIX, "\0" + TARGET["marker"])


@attack
def path_socket() -> object:
    return connect(socket.AF_UNIX, TARGET["socket"])


@attack
def raw_socket() -> object:
    return any_of(partial(make_socket, *three) for three in ((2, 3, 1), (17, 3, 0)))


@attack
def odd_sockets() -> object:
    """NETLINK, ALG, VSOCK: whole subsystems of the kernel."""
    return any_of(partial(make_socket, *two) for two in ((16, 3), (38, 5), (40, 1)))


# ---------------------------------------------------------------- objects shared between processes


@attack
def shared_memory() -> object:
    return call("shmget", TARGET["key"], 0, 0) != -1


@attack
def semaphores() -> object:
    return call("semget", TARGET["key"], 0, 0) != -1


@attack
def message_queue() -> object:
    return call("msgget", TARGET["key"], 0) != -1


@attack
def posix_queue() -> object:
    return call("mq_open", TARGET["marker"].encode(), os.O_RDONLY, 0, None) != -1


@attack
def session_keyring() -> object:
    return call("keyctl", 10, -3, b"user", TARGET["marker"].encode(), 0)


@attack
def user_keyring() -> object:
    call("keyctl", 8, -4, -2)  # linked to its own process keyring: what it then possesses it may search
    return call("keyctl", 10, -4, b"user", TARGET["marker"].encode(), 0)


# ---------------------------------------------------------------- privileges


@attack
def capabilities() -> object:
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capget", header, data)
    return any(data) or any(LIBC.prctl(23, number, 0, 0, 0) == 1 for number in range(64))


@attack
def new_privileges() -> object:
    return LIBC.prctl(39, 0, 0, 0, 0) == 0


@attack
def become_root() -> object:
    os.setresuid(0, 0, 0)
    return "uid 0"


@attack
def root_mapped() -> object:
    """Whether uid 0 of the host has a name inside: then its files are somebody's here."""
    return any(int(line.split()[1]) == 0 for line in read("/proc/self/uid_map").decode().splitlines())


@attack
def groups() -> object:
    return any(group != os.getgid() for group in os.getgroups())


@attack
def join_group() -> object:
    os.setgroups([0])
    return "joined group 0"


@attack
def host_name() -> object:
    name = os.uname().nodename
    return name == TARGET["host_name"] and name


@attack
def control_group_path() -> object:
    paths = [line.split(":", 2)[2] for line in read("/proc/self/cgroup", 1 << 16).decode().splitlines()]
    return next((path for path in paths if path != "/"), "")


@attack
def core_dumps() -> object:
    return resource.getrlimit(resource.RLIMIT_CORE)[1] not in (0, 1)


@attack
def core_helper() -> object:
    """At 1 the kernel does not start it, at 0 it does."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 and not TARGET["core_helper"]:
        raise OSError(errno.ENOENT, "this host has none")
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return resource.getrlimit(resource.RLIMIT_CORE)[1] == 0


# ---------------------------------------------------------------- the filter: calls that fail for another reason, or not at all, without it


BAD = -1
CALLS: dict[str, tuple[int, ...]] = {
    "ptrace": (BAD, BAD),
    "process_vm_readv": (BAD, 0, 0, 0, 0, BAD),
    "process_vm_writev": (BAD, 0, 0, 0, 0, BAD),
    "pidfd_getfd": (BAD, BAD, BAD),
    "kcmp": (BAD, BAD, BAD),
    "process_madvise": (BAD, BAD, 0, 0, BAD),
    "io_uring_setup": (BAD, BAD),
    "io_uring_enter": (BAD, 0, 0, 0),
    "io_uring_register": (BAD, 0, 0, 0),
    "bpf": (BAD, BAD, 0),
    "perf_event_open": (BAD, BAD, BAD, BAD, BAD),
    "userfaultfd": (BAD,),
    "keyctl": (BAD,),
    "add_key": (BAD, BAD),
    "request_key": (BAD, BAD),
    "fsconfig": (BAD, BAD),
    "fsmount": (BAD,),
    "move_mount": (BAD, BAD, BAD, BAD, BAD),
    "mount_setattr": (BAD, BAD, BAD),
    "umount2": (BAD, BAD),
    "unshare": (0,),
    "setns": (BAD, 0),
    "name_to_handle_at": (BAD, BAD, BAD, BAD, BAD),
    "open_by_handle_at": (BAD, BAD, 0),
    "syslog": (BAD,),
    "quotactl": (BAD, BAD, BAD, BAD),
    "swapon": (BAD, BAD),
    "iopl": (99,),
    "init_module": (BAD, 0, BAD),
    "finit_module": (BAD, BAD, BAD),
    "kexec_load": (BAD, BAD, BAD, BAD),
    "clock_settime": (999, BAD),
    "clock_adjtime": (999, BAD),
    "adjtimex": (BAD,),
    "vmsplice": (BAD, BAD, 0, 0),
    "remap_file_pages": (0, 0, BAD, 0, 0),
    "move_pages": (BAD, 0, 0, 0, 0, BAD),
    "memfd_secret": (BAD,),
    "seccomp": (BAD, BAD),
}


def family(name: str) -> object:
    """The calls of a family that were not refused with EPERM."""
    passed = []
    for call_name in TARGET["families"][name]:
        try:
            call(call_name, *CALLS[call_name])
        except OSError as error:
            # Without a filter, a call that this kernel does not have has not succeeded.
            if error.errno == errno.EPERM or (error.errno == errno.ENOSYS and not TARGET["filtered"]):
                continue
        passed.append(call_name)
    if not passed:
        raise OSError(errno.EPERM, name)
    return ", ".join(passed)


@attack
def terminal_input() -> object:
    """TIOCSTI and TIOCLINUX, the second with high bits that the kernel cuts off."""
    for request in (0x5412, 0x1_0000_541C):
        with contextlib.suppress(OSError):
            call("ioctl", -1, request, 0)
        if ctypes.get_errno() != errno.EPERM:
            return hex(request)
    raise OSError(errno.EPERM, "ioctl")


@attack
def dangerous_prctl() -> object:
    options = {"PR_GET_SECUREBITS": 27, "PR_GET_SPECULATION_CTRL": 52}
    passed = [name for name, option in options.items() if LIBC.prctl(option, 0, 0, 0, 0) >= 0]
    if not passed:
        raise OSError(ctypes.get_errno(), "prctl")
    return passed[0]


@attack
def unknown_call() -> object:
    """Only the launcher's count tells whether the filter or the kernel said ENOSYS."""
    return LIBC.syscall(1023, 0, 0, 0, 0, 0, 0) != -1


@attack
def unreadable_flags() -> object:
    """clone3 and openat2 have their flags in memory, where no filter looks: they must seem not to exist."""
    for name in ("clone3", "openat2"):
        with contextlib.suppress(OSError):
            call(name, -1, -1, -1, -1)
        if ctypes.get_errno() != errno.ENOSYS:
            return name
    raise OSError(errno.ENOSYS, "clone3")


@attack
def new_program() -> object:
    try:
        call("execve", b"/no-such-program", None, None)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return "execve was let through"
        raise
    return "executed"


@attack
def new_process() -> object:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "forked"


# ---------------------------------------------------------------- limits that do not end the run; bounded, for where there is none


@attack
def too_many_files_open() -> object:
    kept: list[int] = []
    try:
        while len(kept) < TARGET["open_files"] + 32:
            kept.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for descriptor in kept:
            os.close(descriptor)
    return f"{TARGET['open_files'] + 32} files"


@attack
def too_large_a_file() -> object:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open(TARGET["scratch"] + "/large", "wb") as file:
            os.pwrite(file.fileno(), b"x", TARGET["file_size"] + 1)
    finally:
        signal.signal(signal.SIGXFSZ, before)
        os.unlink(TARGET["scratch"] + "/large")
    return f"{TARGET['file_size'] + 1} bytes"


@attack
def too_much_disk() -> object:
    """In many files: the limit for one does not add up."""
    folder, block = TARGET["scratch"] + "/disk", bytes(1 << 16)
    os.mkdir(folder)
    try:
        for number in range(TARGET["disk"] // len(block) + 16):
            with open(f"{folder}/{number}", "wb", 0) as file:
                file.write(block)
    finally:
        shutil.rmtree(folder)
    return "more than the limit"


@attack
def too_many_files() -> object:
    made: list[str] = []
    try:
        while len(made) < TARGET["files"] + 16:
            made.append(f"{TARGET['scratch']}/file-{len(made)}")
            os.close(os.open(made[-1], os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return f"{len(made)} files"


@attack
def too_many_threads() -> object:
    stop, started = threading.Event(), []
    threading.stack_size(1 << 16)
    try:
        for _ in range(TARGET["processes"] + 8):
            thread = threading.Thread(target=stop.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise OSError(errno.EAGAIN, "clone") from None
    finally:
        stop.set()
        for thread in started:
            thread.join()
    return f"{len(started)} threads"


@attack
def left_files() -> object:
    """In a second run: what the first one left."""
    return any_of(partial(readable, f"{folder}/{TARGET['marker']}-left") for folder in TARGET["leave"])


@attack
def left_memory() -> object:
    return call("shmget", TARGET["key"] + 1, 0, 0) != -1


# ---------------------------------------------------------------- what changes this process for good comes last


@attack
def leave_something() -> object:
    """Objects that the next run, or the host, must not find."""
    for folder in TARGET["leave"]:
        with contextlib.suppress(OSError), open(f"{folder}/{TARGET['marker']}-left", "w") as file:
            file.write("left")
    with contextlib.suppress(OSError):
        call("shmget", TARGET["key"] + 1, 4096, 0o1600)
    with contextlib.suppress(OSError):
        LIBC.prctl(15, TARGET["marker"][:15].encode(), 0, 0, 0)
        if os.fork() == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            for descriptor in range(3):
                os.close(descriptor)
            signal.alarm(30)  # where nothing else ends it
            signal.pause()
            os._exit(0)
    return "left"


@attack
def new_uts_namespace() -> object:
    return not call("unshare", CLONE_NEWUTS) and "unshared"


@attack
def user_namespace() -> object:
    def by_clone() -> str:
        child = call("clone", CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return "cloned"

    return any_of([by_clone, lambda: not call("unshare", CLONE_NEWUSER) and "unshared"])


def main() -> None:
    TARGET.update(json.loads(sys.stdin.buffer.readline()))
    os.makedirs(TARGET["scratch"], exist_ok=True)
    outcome = {}
    for name in TARGET["attacks"]:
        ctypes.set_errno(0)
        try:
            got = family(name) if name in TARGET["families"] else ATTACKS[name]()
            outcome[name] = [bool(got), got if isinstance(got, str) else ""]
        except OSError as error:
            outcome[name] = [False, errno.errorcode.get(error.errno or 0, str(error))]
        except Exception as error:  # a probe that is broken is no promise kept
            outcome[name] = [True, f"the check itself failed: {type(error).__name__}: {error}"]
    os.write(1, json.dumps(outcome).encode() + b"\n")


main()
