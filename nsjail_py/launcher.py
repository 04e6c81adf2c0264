"""The resident launcher: started once per process, asked for one run after the other, gone when this process is.

It is spawned, never forked: it has none of our memory, environment or descriptors, and it is alone in having the rights that a jail
takes. Every run has a channel of its own: reports come back on it, commands go out, and closing it kills.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import errno
import fcntl
import itertools
import os
import select
import signal
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import idmap
from ._native import ffi, lib
from .advice import advice
from .errors import LauncherDied, SetupError, during
from .plan import GROUPS, Sealed

if TYPE_CHECKING:
    from .cgroups import Claim

PROGRAM = Path(__file__).parent / "nsjail-launcher"
UID_BASE = 1_900_000_000
"""The first host id for payloads: above the ranges that distributions, systemd and containers hand out (systemd.io/UIDS-GIDS)."""
KEPT_ID = UID_BASE - 1
"""Owns the work directories that root's runs leave: no run has this id, so none can read another's by being their owner."""
UID_BLOCK = 1024
UID_BLOCKS = 64
LOCKS = Path("/run/nsjail_py")
NO_LOCKS = "in a systemd unit with ProtectSystem=strict: RuntimeDirectory=nsjail_py and RuntimeDirectoryPreserve=yes"
"""Preserved, since its locks are everybody's: a unit that ends must not take them away."""
NO_IDS_REASON = f"root in a user namespace without the ids from {KEPT_ID} on"
NO_IDS = "in a systemd unit PrivateUsers=no, or User= or DynamicUser=yes; in a container run as an ordinary user"
REQUEST = struct.Struct("=IIQII")
"""`struct request` of native/plan.h."""
MAX_PLANS = 64
"""How many plans keep a descriptor open in this process. With two jails each in stock the launcher has 2,000, of 4,096 on some hosts."""
END_S = 5.0
"""How long a launcher may take to end."""
DYING_S = 0.2
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""All between this process, its launcher and its runs."""
inheritable: weakref.WeakSet[Any] = weakref.WeakSet()
"""What else a forked child lets go of, by its method `inherited`."""
numbers = itertools.count(1)
"""Names for plans and templates."""

KINDS = {"none": lib.CGROUP_NONE, "v1": lib.CGROUP_V1, "v2": lib.CGROUP_V2}


class Launcher:
    """A running launcher and what it was given."""

    def __init__(self) -> None:
        from . import cgroups

        self.pid = 0
        self.uid_lock = -1
        self.plans: dict[tuple[bytes, int], tuple[int, Sealed]] = {}
        """Last is the one that was asked for last."""
        self.planning = threading.Lock()
        self.sending = threading.Lock()
        """A socket that another thread closes must not be one that is just written to."""
        self.socket, its = pair()
        self.claim: Claim = cgroups.Claim("none", "rootless")
        try:
            with its:
                uid_base, uid_count = self._uids() if os.geteuid() == 0 else (0, 0)
                self.pid = self._spawn(its.fileno())
                self.claim = cgroups.claim(self.pid)
                self._hello(uid_base, uid_count)
        except BaseException:
            self.close()
            raise

    def _uids(self) -> tuple[int, int]:
        """A block of host ids that no other launcher has. The lock lives as long as this process."""
        if not idmap.covers(KEPT_ID, 1 + UID_BLOCK * UID_BLOCKS):
            raise SetupError("uid pool", detail=NO_IDS_REASON, advice=NO_IDS)
        for number in range(UID_BLOCKS):
            lock = self._lock(LOCKS / f"uids-{number}")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            self.uid_lock = lock
            return UID_BASE + number * UID_BLOCK, UID_BLOCK
        raise SetupError(
            "uid pool", detail=f"all {UID_BLOCKS} blocks of host ids are in use", advice="end some of the processes that use nsjail_py"
        )

    def _lock(self, path: Path) -> int:
        try:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SetupError("uid pool", error.errno or 0, str(error.filename), NO_LOCKS) from None

    def _spawn(self, control: int) -> int:
        high = null = -1
        try:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            high = fcntl.fcntl(control, fcntl.F_DUPFD_CLOEXEC, 3)  # closed standard streams of ours must not get in its way
            return os.posix_spawn(
                PROGRAM,
                [b"nsjail-launcher"],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, high, 0),
                    (os.POSIX_SPAWN_DUP2, null, 1) if null > 2 else (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_RDWR, 0),
                ],
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT),
            )
        except OSError as error:
            remedy = "the package was not built whole: install it again" if error.errno == 2 else advice("launcher", error.errno or 0)
            raise SetupError("launcher", error.errno or 0, str(PROGRAM), remedy) from None
        finally:
            for descriptor in (high, null):
                if descriptor >= 0:
                    os.close(descriptor)

    def _hello(self, uid_base: int, uid_count: int) -> None:
        hello = ffi.new("struct hello *")
        hello.magic, hello.version = lib.HELLO_MAGIC, lib.FORMAT_VERSION
        hello.cgroup_kind = KINDS[self.claim.kind]
        hello.uid_base, hello.uid_count, hello.caller = uid_base, uid_count, os.getpid()
        descriptors: list[int] = []
        try:
            for name, path in sorted(self.claim.directories.items(), key=lambda item: GROUPS[item[0]]):
                hello.groups |= 1 << GROUPS[name]
                descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self.send(bytes(ffi.buffer(hello)), descriptors)
        except (BrokenPipeError, ConnectionResetError):
            raise SetupError("launcher", detail="it ends as soon as it is started") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def submit(self, plan: bytes, order: bytes, descriptors: list[int], stock: int, template: int = 0) -> socket.socket:
        """Asks for one run. stock: how many jails are to wait for further ones. template: the number of the one that is started, or that
        is to fork the run. The descriptors stay the caller's; the channel is his."""
        with during("request"):
            return self._submit(plan, order, descriptors, stock, template)

    def _submit(self, plan: bytes, order: bytes, descriptors: list[int], stock: int, template: int) -> socket.socket:
        number, block = self._plan(plan, template)
        large = Sealed("order", order) if len(order) > lib.MAX_INLINE else None
        head = REQUEST.pack(lib.REQUEST_MAGIC, 0 if large else len(order), number, stock, template)
        channel, its = pair()
        with its:
            try:
                if large:
                    self.send(head, [its.fileno(), block.fd, *descriptors, large.fd])
                else:
                    self.send(head + order, [its.fileno(), block.fd, *descriptors])
            except BaseException:
                channel.close()
                raise
        return channel

    def _plan(self, plan: bytes, template: int) -> tuple[int, Sealed]:
        """The number and the sealed block under which the launcher knows a plan."""
        with self.planning:
            known = self.plans.pop((plan, template), None) or (next(numbers), Sealed("plan", plan))
            self.plans[plan, template] = known
            for oldest in list(self.plans)[:-MAX_PLANS]:
                self.plans.pop(oldest, None)  # what is in stock for it goes when nobody has asked for ten seconds
            return known

    def forget(self, template: int) -> None:
        """The plans of one that has ended. Without the lock: a collector may end it in a thread that has that, at any step."""
        for key in list(self.plans):
            if key[1] == template:
                self.plans.pop(key, None)

    def forget_plans(self) -> None:
        with self.planning:
            self.plans = {}

    def send(self, message: bytes, descriptors: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with self.sending:
            if self.socket.fileno() < 0:  # another thread has found it dead
                raise BrokenPipeError
            try:
                self.socket.sendmsg([message], rights, socket.MSG_NOSIGNAL)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                with most_files():
                    self.socket.sendmsg([message], rights, socket.MSG_NOSIGNAL)

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        poll = select.poll()
        with self.sending:
            if self.socket.fileno() < 0:
                return False
            poll.register(self.socket, 0)
            return not poll.poll(0)

    def dies(self) -> bool:
        """Whether it is dead, or just dying: of one that is the descriptors go in any order. Others may send meanwhile."""
        deadline = time.monotonic() + DYING_S
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def close(self) -> None:
        """Ends the launcher and every jail of it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # whoever is just sending gets an error
        with self.sending:
            self.socket.close()
        self.forget_plans()
        if self.pid:
            _reap(self.pid)
            self.pid = 0
        from . import cgroups

        cgroups.release(self.claim)
        if self.uid_lock >= 0:  # the last of its jails is gone, so the ids are free
            os.close(self.uid_lock)
            self.uid_lock = -1


def pair(kind: int = socket.SOCK_SEQPACKET) -> tuple[socket.socket, socket.socket]:
    """Two ends that stay this process's own."""
    ends = socket.socketpair(socket.AF_UNIX, kind)
    _sockets.update(ends)
    return ends


@contextlib.contextmanager
def most_files() -> Iterator[None]:
    """As many open files as this process may give itself. The kernel compares that number, the soft limit, with how many descriptors of its
    user's are on their way, and as an ordinary user our payloads are that user. unix(7)"""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _reap(pid: int) -> None:
    """Waits for a launcher to end. One that somebody has stopped would not: it is killed, and the kernel ends its jails."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(ChildProcessError):  # somebody waits for all children, or ignores SIGCHLD
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)


_lock = threading.Lock()
_current: Launcher | None = None


def current() -> Launcher:
    """The launcher of this process, started when there is none."""
    global _current
    with _lock:
        if _current is None:
            with during("launcher"):
                _current = Launcher()
        return _current


def peek() -> Launcher | None:
    """The launcher of this process, if there is one."""
    return _current


def submit(plan: bytes, order: bytes, descriptors: list[int], stock: int, template: int = 0) -> tuple[Launcher, socket.socket]:
    """Launcher.submit of the current one, or of a new one where that has died since the last run: nothing was started then."""
    launcher = current()
    try:
        return launcher, launcher.submit(plan, order, descriptors, stock, template)
    except (BrokenPipeError, ConnectionResetError):
        lost(launcher)
    launcher = current()
    try:
        return launcher, launcher.submit(plan, order, descriptors, stock, template)
    except (BrokenPipeError, ConnectionResetError):
        lost(launcher)
        raise LauncherDied("the launcher ends as soon as it is started, and the next one, too") from None


def lost(launcher: Launcher) -> None:
    """This one is dead. The next run gets a new one."""
    global _current
    with _lock:
        if _current is launcher:
            _current = None
            launcher.close()


def unmade(launcher: Launcher, report: Any) -> None:
    """After a jail that could not be made. Where somebody has removed the launcher's control groups, empty as they were, it is lost."""
    gone = report.step == lib.STEP_CGROUP and report.error == errno.ENOENT
    if gone and not all(directory.is_dir() for directory in launcher.claim.directories.values()):
        lost(launcher)


@atexit.register
def shutdown() -> None:
    """Ends the launcher of this process, if there is one; a later run starts another."""
    global _current
    with _lock:
        if _current is not None:
            _current.close()
            _current = None


def _forget() -> None:
    """In a forked child: the launcher belongs to the parent, and so do its runs. Our copies of their sockets would keep them alive, or
    hide their end."""
    global _current, _lock
    _lock = threading.Lock()
    for ours in list(_sockets):
        ours.close()
    if _current is not None:
        if _current.uid_lock >= 0:
            os.close(_current.uid_lock)
        _current = None
    for each in list(inheritable):
        each.inherited()


os.register_at_fork(after_in_child=_forget)
