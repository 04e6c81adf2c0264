"""The same for asyncio: nothing blocks the event loop, and cancelling `run` kills its jail.

A Process that you started yourself stays yours: who is cancelled in `communicate` or `stream` has it still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from . import launcher
from .errors import JailError, PolicyError, SetupError
from .jail import Jail, Process
from .policy import Policy
from .process import LINGER_S
from .result import Result, Verdict
from .retry import TRIES, worth_another
from .streams import captured, split

LATE_S = 0.02
"""How late the loop may be with a timeout before a thread of its own sees to it."""
Where = Policy | str | os.PathLike[str] | Jail
"""A policy, or a Jail that is there already: its stock, its warm interpreter."""


async def run(args: Any, *, policy: Where = "untrusted", **options: Any) -> Result:
    """As nsjail_py.run. A Jail as policy is used as it is, and options that would change its policy are an error. timeout: seconds from the
    call on; then the run is killed, also while something blocks the event loop, and TimeoutError raised, as by asyncio.timeout."""
    streams, changes = split(options)
    data, timeout = streams.pop("input", None), streams.pop("timeout", None)
    jail = _jail(policy, changes)
    return await _to_end(lambda: jail.start(args, **captured(data, streams)), data, timeout)


async def run_python(
    source: str | bytes, *, policy: Where = "untrusted", args: Any = (), filename: str = "main.py", **options: Any
) -> Result:
    """As nsjail_py.run_python; policy as for `run`."""
    streams, changes = split(options)
    data, timeout = streams.pop("input", None), streams.pop("timeout", None)
    jail = _jail(policy, changes)
    return await _to_end(lambda: jail.start_python(source, args=args, filename=filename, **captured(data, streams)), data, timeout)


def _jail(policy: Where, changes: dict[str, Any]) -> Jail:
    if not isinstance(policy, Jail):
        return Jail(policy, **changes)
    if changes:
        raise PolicyError(f"a Jail's policy stands: {', '.join(changes)} cannot be changed for one run")
    return policy


async def _to_end(start: Callable[[], Process], data: bytes | None, timeout: float | None) -> Result:
    # Building a root for the first time takes seconds, so the start has a thread; what follows only waits.
    async with asyncio.timeout(timeout) as bound:
        for _ in range(TRIES - 1):
            used = launcher.peek()
            try:
                return await _within(bound, await asyncio.to_thread(start), data)
            except SetupError as error:
                if not worth_another(error, used):
                    raise
        return await _within(bound, await asyncio.to_thread(start), data)


async def _within(bound: asyncio.Timeout, process: Process, data: bytes | None) -> Result:
    try:
        with _killed_at(bound.when(), process) as late:
            result = await communicate(process, data)
            if late.is_set() and result.verdict is Verdict.killed:
                raise TimeoutError
            return result
    except (Exception, asyncio.CancelledError):
        await _ended(process)
        raise
    finally:
        process.let_go()  # a traceback may keep the handle


@contextlib.contextmanager
def _killed_at(when: float | None, process: Process) -> Iterator[threading.Event]:
    """Kills the run a moment after that time of the loop's clock, if the loop has not: something keeps it from looking. What it gives is
    set then."""
    late = threading.Event()
    if when is None:
        yield late
        return

    def kill() -> None:
        late.set()
        with contextlib.suppress(OSError, JailError):
            process.kill()

    rest = max(0.0, when - asyncio.get_running_loop().time()) + LATE_S
    timer = threading.Timer(min(rest, threading.TIMEOUT_MAX), kill)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # where no thread can be had, the loop alone keeps the time
        timer.start()
    try:
        yield late
    finally:
        timer.cancel()


async def _ended(process: Process) -> None:
    """Kills the run, and waits for its end while the loop goes on; who is cancelled once more meanwhile does not wait for it."""
    if not process.reported:
        process.kill()
        with contextlib.suppress(JailError, TimeoutError):
            await _heard(process)
            async with asyncio.timeout(LINGER_S):
                await _carried(process)


async def communicate(process: Process, data: bytes | None = None) -> Result:
    """Process.communicate, driven by the running event loop."""
    await _heard(process, data)
    await _carried(process)
    return process.wait()


async def _heard(process: Process, data: bytes | None = None) -> None:
    with _moving(process, data) as moved:
        while not process.reported:
            await moved()


async def _carried(process: Process) -> None:
    """Until all output is in the caller's files. The reader of such a pipe may be a task of this loop, so the loop itself waits: a thread
    of its executor would keep it from ending where nobody reads."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(changed.set)

    for carrier in process.outgoing:
        carrier.when_over(tell)
        while not carrier.over:
            await changed.wait()
            changed.clear()


async def stream(process: Process, data: bytes | None = None) -> AsyncGenerator[tuple[str, bytes], None]:
    """Process.stream, driven by the running event loop while a piece is waited for. `communicate` has the result then, or the rest."""
    exchange = process.exchange(data)
    while not process.reported:
        with _moving(process) as moved:  # not while one is given: a loop closes what was left there only some time later
            await moved()
        for piece in exchange.taken():
            yield piece
    for piece in exchange.taken():
        yield piece


@contextlib.contextmanager
def _moving(process: Process, data: bytes | None = None) -> Iterator[Any]:
    """Moves the streams while the loop runs; what it gives waits until something has moved, and raises what went wrong with it."""
    loop, exchange = asyncio.get_running_loop(), process.exchange(data)
    if exchange.looped:
        raise RuntimeError("this run's streams are moved already, by another communicate or stream")
    changed = asyncio.Event()
    errors: list[BaseException] = []
    reading, writing = set[int](), set[int]()

    def step(descriptor: int) -> None:
        try:
            exchange.step(descriptor)
            refresh()
        except BaseException as error:
            errors.append(error)
        changed.set()

    def refresh() -> None:
        with process.lock:
            wanted = {} if process.reported else exchange.wanted
        wanted_reading = {fd for fd, events in wanted.items() if events & select.POLLIN}
        wanted_writing = set(wanted) - wanted_reading
        for fd in reading - wanted_reading:
            loop.remove_reader(fd)
        for fd in writing - wanted_writing:
            loop.remove_writer(fd)
        for fd in wanted_reading - reading:
            loop.add_reader(fd, step, fd)
        for fd in wanted_writing - writing:
            loop.add_writer(fd, step, fd)
        reading.clear()
        reading.update(wanted_reading)
        writing.clear()
        writing.update(wanted_writing)

    async def moved() -> None:
        await changed.wait()
        changed.clear()
        if errors:
            raise errors[0]

    with process.waiting():
        try:
            exchange.looped = True
            refresh()
            yield moved
        finally:
            exchange.looped = False
            for fd in reading:
                loop.remove_reader(fd)
            for fd in writing:
                loop.remove_writer(fd)
