"""What the attacks of `nsjail-py selftest` aim at: worthless objects of the host, made before the first run and removed at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from . import syscalls
from .cachedir import directory

VARIABLE = "NSJAIL_PY_SELFTEST"
LIBC = ctypes.CDLL(None, use_errno=True)
PLACES = ("/var/tmp", "/srv", "/opt")
"""Where a jail that shows the host's files would see a file of ours; its /tmp is private in any case."""
IPC_RMID, IPC_CREAT = 0, 0o1000
PROCESS_KEYRING, SESSION_KEYRING, USER_KEYRING = -2, -3, -4
KEYCTL_LINK, KEYCTL_UNLINK = 8, 9


def call(name: str, *arguments: Any) -> int:
    """A system call by its name. Raises OSError."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(syscalls._number(name)), *words, *[ctypes.c_long(0)] * (6 - len(words)))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


class Canaries:
    """All of them, as a context manager. What could not be made is in `lacks`, with the reason, by the attack that needs it."""

    def __init__(self) -> None:
        self.lacks: dict[str, str] = {}
        self.marker = f"st-{secrets.token_hex(8)}"
        self.secret = f"secret-{secrets.token_hex(8)}"
        self.key = secrets.randbelow(0x3FFFFFFF) * 2 + 2
        self._kept = contextlib.ExitStack()
        self.target: dict[str, Any] = {"marker": self.marker, "secret": self.secret, "key": self.key}

    def __enter__(self) -> Self:
        try:
            self._environment()
            self._files()
            self._process()
            self._sockets()
            for name, make in self._objects():
                try:
                    self._kept.callback(make())
                except OSError as error:
                    self.lacks[name] = f"the host itself cannot make one: {error.strerror}"
        except BaseException:
            self._kept.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def _environment(self) -> None:
        os.environ[VARIABLE] = self.secret
        self._kept.callback(os.environ.pop, VARIABLE, None)
        self.target |= {"host_name": os.uname().nodename, "group": os.getpgrp(), "session": os.getsid(0)}

    def _files(self) -> None:
        place = next((p for p in PLACES if os.access(p, os.W_OK)), None) or str(directory("selftest"))
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.marker}-", dir=place))
        self._kept.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.chmod(0o755)
        for name, mode in (("file", 0o644), ("secret_file", 0o600)):
            path = self.folder / name
            path.write_text(self.secret)
            path.chmod(mode)
            self.target[name] = str(path)
        self.target["tmp_files"] = []
        for top, attack in (("/tmp", "host-tmp"), ("/dev/shm", "host-shm")):
            path = Path(top, self.marker)
            try:
                path.write_text(self.secret)
                path.chmod(0o644)
            except OSError as error:
                self.lacks[attack] = f"{top} of the host cannot be written: {error.strerror}"
            else:
                self._kept.callback(path.unlink, missing_ok=True)
            self.target["tmp_files"].append(str(path))
        self.inherited = os.open(self.target["file"], os.O_RDONLY)
        self._kept.callback(os.close, self.inherited)
        os.set_inheritable(self.inherited, True)

    def _process(self) -> None:
        """One that does nothing, with the marker among its arguments and the secret in its environment."""
        command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(120)", self.marker]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.priority = os.getpriority(os.PRIO_PROCESS, self.process.pid)
        self._kept.callback(self.process.wait)
        self._kept.callback(self.process.kill)
        self.target["pid"] = self.process.pid

    def _sockets(self) -> None:
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.marker}"),
            ("path", socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
        ):
            made = self._kept.enter_context(socket.socket(family, kind))
            made.bind(address)
            if kind == socket.SOCK_STREAM:
                made.listen(8)
            if name == "udp":
                made.setblocking(False)
                self.udp = made
            if family == socket.AF_INET:
                self.target[name] = made.getsockname()[1]
        self.target["socket"] = str(self.folder / "socket")
        Path(self.target["socket"]).chmod(0o666)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            try:
                made.connect(("192.0.2.1", 9))
            except OSError as error:
                self.lacks["route"] = f"the host itself has none: {error.strerror}"
        if os.uname().nodename == "jail":
            self.lacks["host-name"] = "the host has the jail's name"

    def _objects(self) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
        yield "shared-memory", self._shared_memory
        yield "semaphores", self._semaphores
        yield "message-queue", self._message_queue
        yield "posix-queue", self._posix_queue
        yield "session-keyring", lambda: self._key(SESSION_KEYRING)
        yield "user-keyring", lambda: self._key(USER_KEYRING)

    def _shared_memory(self) -> Callable[[], object]:
        made = call("shmget", self.key, 4096, IPC_CREAT | 0o666)
        return lambda: call("shmctl", made, IPC_RMID, None)

    def _semaphores(self) -> Callable[[], object]:
        made = call("semget", self.key, 1, IPC_CREAT | 0o666)
        return lambda: call("semctl", made, 0, IPC_RMID)

    def _message_queue(self) -> Callable[[], object]:
        made = call("msgget", self.key, IPC_CREAT | 0o666)
        return lambda: call("msgctl", made, IPC_RMID, None)

    def _posix_queue(self) -> Callable[[], object]:
        os.close(call("mq_open", self.marker.encode(), os.O_CREAT | os.O_RDWR, 0o666, None))
        return lambda: call("mq_unlink", self.marker.encode())

    def _key(self, ring: int) -> Callable[[], object]:
        call("keyctl", KEYCTL_LINK, ring, PROCESS_KEYRING)  # possessed by this process, and so by nobody later
        made = call("add_key", b"user", self.marker.encode(), self.secret.encode(), len(self.secret), ring)
        return lambda: call("keyctl", KEYCTL_UNLINK, made, ring)

    # ------------------------------------------------ what became of them

    def datagram_came(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return self.udp.recv(256) == self.secret.encode()
        return False

    def process_changed(self) -> str:
        if self.process.poll() is not None:
            return "it is dead"
        return "its priority is another" if os.getpriority(os.PRIO_PROCESS, self.process.pid) != self.priority else ""

    def left_processes(self) -> list[int]:
        """Processes on the host that bear the name which the run's processes took."""
        found = []
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and Path(entry.path, "comm").read_text().strip() == self.marker[:15]:
                    found.append(int(entry.name))
        return found

    def clear_away(self) -> None:
        """What a run without these protections left: only what bears our name."""
        for pid in self.left_processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            call("shmctl", call("shmget", self.key + 1, 0, 0), IPC_RMID, None)
        for folder in ("/tmp", "/dev/shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{folder}/{self.marker}-left")
