"""The same for asyncio: nothing blocks the event loop, and cancelling a task kills its jail."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from .jail import Jail, Process
from .policy import Policy
from .result import Result
from .streams import captured, split


async def run(args: Any, *, policy: Policy | str | os.PathLike[str] = "untrusted", **options: Any) -> Result:
    """As nsjail_py.run."""
    streams, changes = split(options)
    data, timeout = streams.pop("input", None), streams.pop("timeout", None)
    jail = Jail(policy, **changes)
    return await _to_end(lambda: jail.start(args, **captured(data, streams)), data, timeout)


async def run_python(
    source: str | bytes, *, policy: Policy | str | os.PathLike[str] = "untrusted", args: Any = (), filename: str = "main.py", **options: Any
) -> Result:
    """As nsjail_py.run_python."""
    streams, changes = split(options)
    data, timeout = streams.pop("input", None), streams.pop("timeout", None)
    jail = Jail(policy, **changes)
    return await _to_end(lambda: jail.start_python(source, args=args, filename=filename, **captured(data, streams)), data, timeout)


async def _to_end(start: Any, data: bytes | None, timeout: float | None) -> Result:
    # Building a root for the first time takes seconds, so the start has a thread; what follows only waits.
    process: Process = await asyncio.to_thread(start)
    with process:
        async with asyncio.timeout(timeout):
            return await communicate(process, data)


async def communicate(process: Process, data: bytes | None = None) -> Result:
    """Process.communicate, driven by the running event loop."""
    loop, exchange = asyncio.get_running_loop(), process.exchange(data)
    done = loop.create_future()
    reading, writing = set[int](), set[int]()

    def step(descriptor: int) -> None:
        try:
            exchange.step(descriptor)
            refresh()
        except BaseException as error:
            if not done.done():
                done.set_exception(error)
            return
        if process.reported and not done.done():
            done.set_result(None)

    def refresh() -> None:
        import select

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

    try:
        refresh()
        await done
    finally:
        for fd in reading:
            loop.remove_reader(fd)
        for fd in writing:
            loop.remove_writer(fd)
    return process.wait()
