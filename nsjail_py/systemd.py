"""Talking to systemd: a service that lives on tells when it is ready, alive and going; each run is an entry with fields in the journal.

    with systemd.Resident():          # READY=1 when a jail can be made, WATCHDOG=1 while the launcher answers, STOPPING=1 at the end
        ...
        systemd.journal(result)       # journalctl NSJAIL_VERDICT=memory

Outside of a unit all of it does nothing. sd_notify(3), systemd's JOURNAL_NATIVE_PROTOCOL; unitfile.py writes units.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from .errors import JailError, SetupError

if TYPE_CHECKING:
    from .launcher import Launcher
    from .result import Result

JOURNAL = "/run/systemd/journal/socket"
INFO, WARNING, ERROR = 6, 4, 3
SECONDS = 1.0
"""That the thread of the watchdog may take to end."""


def notify(*assignments: str) -> bool:
    """Tells the manager, `READY=1` for instance. False where there is none that wants to know."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    return _send(f"\0{address[1:]}" if address[0] == "@" else address, "\n".join(assignments).encode())


def has_journal() -> bool:
    """Whether our standard error goes to the journal. systemd.exec(5), JOURNAL_STREAM"""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def journal(run: Result | JailError, **fields: str) -> bool:
    """Writes one entry for a run, with its verdict and use in fields that journalctl can select by; or for one that never was, with the
    error in place of the verdict, and the step that failed. fields: more of them, in capitals. False where there is no journal."""
    told = _of_error(run) if isinstance(run, JailError) else _of_result(run)
    entry = {"SYSLOG_IDENTIFIER": "nsjail-py", **told, **fields}
    return _send(JOURNAL, b"".join(_field(name, value.encode(errors="backslashreplace")) for name, value in entry.items() if value))


def _of_result(result: Result) -> dict[str, str]:
    return {
        "MESSAGE": result.summary,
        "PRIORITY": str(WARNING if result.verdict.is_limit else INFO),
        "NSJAIL_VERDICT": str(result.verdict),
        "NSJAIL_POLICY": result.policy,
        "NSJAIL_MODE": result.mode,
        "NSJAIL_EXIT_CODE": _text(result.exit_code),
        "NSJAIL_SIGNAL": _text(result.signal),
        "NSJAIL_WALL_USEC": str(round(result.wall_time * 1e6)),
        "NSJAIL_CPU_USEC": str(round(result.cpu_time * 1e6)),
        "NSJAIL_MEMORY_PEAK": str(result.peak_memory),
        "NSJAIL_MEMORY_SOURCE": result.memory_source,
        "NSJAIL_DENIED": " ".join(f"{name}:{count}" for name, count in result.denied.items()),
        "NSJAIL_UNAVAILABLE": " ".join(one.name for one in result.protections if one.state == "unavailable"),
    }


def _of_error(error: JailError) -> dict[str, str]:
    return {
        "MESSAGE": str(error),
        "PRIORITY": str(ERROR),
        "NSJAIL_ERROR": type(error).__name__,
        "NSJAIL_STEP": error.step if isinstance(error, SetupError) else "",
    }


class Resident:
    """The time in which a service can make jails. Starts the launcher before it says READY; a set-up error is raised, and READY never said.

    The watchdog of the unit (WatchdogSec=) is fed by a thread, once for each answer of the launcher's: one that hangs gives none, and a
    dead one is replaced. No run waits for that.

    SIGTERM, by which systemd stops a unit, would end Python at once. Entered in the main thread, where nobody has set another action for
    it, it raises SystemExit there instead, once: the block is left, under asyncio.run by cancelling its tasks, and the process ends with 0.
    """

    def __init__(self, status: str = "") -> None:
        self._status = status
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        from . import launcher

        launcher.current()
        self._pid = os.getpid()
        _replace(signal.SIG_DFL, self._terminated)
        notify("READY=1", f"STATUS={self._status or 'jails can be made'}")
        if interval := watchdog_interval():
            self._thread = threading.Thread(target=self._feed, args=(interval,), name="systemd-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        from . import launcher

        _replace(self._terminated, signal.SIG_DFL)
        notify("STOPPING=1")
        self._over.set()
        if self._thread is not None:
            self._thread.join(SECONDS)
        launcher.shutdown()  # and every jail with it; whoever still wants to ask one that hangs gets an error

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # for those who ask twice
        if os.getpid() != self._pid:
            signal.raise_signal(number)  # a fork, which is no service
        raise SystemExit(0)  # what systemd takes for a success, as it does the end by this signal

    def _feed(self, interval: float) -> None:
        from . import launcher
        from .streams import ready

        answer: socket.socket | None = None
        while not self._over.wait(interval / 2):
            with contextlib.suppress(JailError, OSError):
                if answer is not None:
                    if not ready([answer.fileno()], 0):
                        continue  # it may be busy; the manager says for how long
                    if answer.recv(1 << 16):
                        notify("WATCHDOG=1")
                    answer.close()
                    answer = None
                if not (current := launcher.current()).alive:
                    launcher.lost(current)
                answer = _ask(launcher.current())


def _ask(current: Launcher) -> socket.socket:
    """Where the launcher answers. That it is there does not say that it does anything. What it is sent is no request, and is refused by the
    loop that makes jails: it costs some microseconds, and no jail."""
    from . import launcher

    answer, its = launcher.pair()
    with contextlib.ExitStack() as on_error, its:
        on_error.callback(answer.close)
        current.send(b"?", [its.fileno()])
        on_error.pop_all()
    return answer


def _replace(action: Any, by: Any) -> None:
    """The action of SIGTERM, where it is this one. In another thread than the main one it stays."""
    if signal.getsignal(signal.SIGTERM) == action:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, by)


def watchdog_interval() -> float:
    """Seconds between two signs of life: half of what the manager waits. 0: it does not wait for any. sd_watchdog_enabled(3)"""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(microseconds) / 2e6 if microseconds.isdecimal() and pid == str(os.getpid()) else 0.0


def _text(value: int | None) -> str:
    return "" if value is None else str(int(value))


def _field(name: str, value: bytes) -> bytes:
    """With its length before it a value may hold anything."""
    return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"


def _send(address: str, message: bytes) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(message, socket.MSG_NOSIGNAL, address)
        except OSError:
            return False
    return True
