"""Output as it comes, and where a run's time went."""

from __future__ import annotations

import asyncio
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE

import nsjail_py
from nsjail_py import PIPE, Jail, PolicyError, Process, Verdict, aio

SLOW = "import sys, time\nfor n in range(3):\n  print(n, flush=True); time.sleep(0.3)\nprint('end', file=sys.stderr)"


def test_output_comes_while_the_program_runs() -> None:
    with Jail("untrusted").start_python(SLOW, stdout=PIPE, stderr=PIPE) as process:
        pieces = [(name, data, time.monotonic()) for name, data in process.stream()]
        result = process.wait().check()
    assert [(name, data) for name, data, _ in pieces] == [("stdout", b"0\n"), ("stdout", b"1\n"), ("stdout", b"2\n"), ("stderr", b"end\n")]
    assert pieces[2][2] - pieces[0][2] > 0.5
    assert result.stdout == b"", "what was given is not kept"


def test_asyncio_has_it_too_while_other_tasks_go_on() -> None:
    async def main() -> tuple[list[tuple[str, bytes]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.02)
                ticks += 1

        task = asyncio.create_task(tick())
        with await asyncio.to_thread(Jail("untrusted").start_python, SLOW, stdout=PIPE, stderr=PIPE) as process:
            pieces = [piece async for piece in aio.stream(process)]
            process.wait().check()
        task.cancel()
        return pieces, ticks

    pieces, ticks = asyncio.run(main())
    assert b"".join(data for name, data in pieces if name == "stdout") == b"0\n1\n2\n" and ticks > 5


def polled(process: Process) -> None:
    while process.poll() is None:
        time.sleep(0.01)


async def streamed(process: Process) -> bytes:
    return b"".join([data async for _, data in aio.stream(process)])


HEARD = {"by wait": Process.wait, "by poll": polled, "by pid": lambda process: time.sleep(0.2) or process.pid}
READ: dict[str, Callable[[Process], bytes]] = {
    "communicate": lambda process: process.communicate().stdout,
    "stream": lambda process: b"".join(data for _, data in process.stream()),
    "aio.communicate": lambda process: asyncio.run(aio.communicate(process)).stdout,
    "aio.stream": lambda process: asyncio.run(streamed(process)),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("heard", HEARD)
def test_output_is_there_when_the_end_was_heard_before(heard: str, read: str) -> None:
    process = Jail("untrusted").start(["/bin/echo", "hi"], stdout=PIPE)
    HEARD[heard](process)
    assert READ[read](process) == b"hi\n"
    assert process.wait().ok and process.stdout is not None and process.stdout.closed


def test_output_is_whole_when_the_end_is_heard_between_two_readings() -> None:
    source = "import time; print('a', flush=True); time.sleep(0.8); print('b')"
    with Jail("untrusted").start_python(source, stdout=PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.4)
        polled(process)
        assert process.communicate().stdout == b"a\nb\n"


def test_output_that_is_read_late_has_its_limit_and_keeps_what_the_interpreter_told() -> None:
    with Jail("untrusted", audit="report", output=5).start_python("print('x' * 9)", stdout=PIPE) as process:
        assert process.wait().ok
        result = process.communicate()
    assert (result.verdict, result.stdout, result.stdout_cut) == (Verdict.output, b"xxxxx", True) and result.audit is not None


def test_a_flood_is_bounded_and_ends_the_run() -> None:
    with Jail("untrusted", output="1M").start(["/usr/bin/yes"], stdout=PIPE) as process:
        size = sum(len(data) for _, data in process.stream())
        assert process.wait().verdict is Verdict.output and size == 1 << 20


def test_a_program_that_is_never_silent_holds_no_timeout_up() -> None:
    source = "import os\nwhile True: os.write(1, b'x')"
    with Jail("untrusted", output="1G", wall_time=5 * PATIENCE, cpu_time=None).start_python(source, stdout=PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1) == b"x"
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.3)


def test_input_is_fed_while_output_is_taken() -> None:
    data = bytes(range(256)) * 20_000
    with Jail("untrusted").start(["/bin/cat"], stdin=PIPE, stdout=PIPE) as process:
        assert b"".join(piece for _, piece in process.stream(data)) == data


def test_leaving_the_iterator_early_kills_the_run(leaves_nothing: None) -> None:
    with Jail("untrusted").start(["/usr/bin/yes"], stdout=PIPE) as process:
        next(process.stream())
    assert process.wait().verdict is Verdict.killed


@pytest.mark.parametrize("limit", ["timeout", "wall_time"])
def test_a_limit_of_time_holds_while_something_blocks_the_event_loop(limit: str, tmp_path: Path) -> None:
    """The program would write another line each 10 ms."""
    source = "import sys, time\nwhile True: print(end='.', flush=True); time.sleep(0.01)"
    ended: list[int] = []

    async def main() -> None:
        with open(tmp_path / "out", "wb") as out:
            run = asyncio.create_task(aio.run_python(source, stdout=out, **{limit: 0.3 * PATIENCE}))  # type: ignore[arg-type]
            while not out.tell() and not (tmp_path / "out").stat().st_size:
                await asyncio.sleep(0.01)
            time.sleep(1.5 * PATIENCE)
            ended.append((tmp_path / "out").stat().st_size)
            time.sleep(0.3)
            ended.append((tmp_path / "out").stat().st_size)
            if limit == "timeout":
                with pytest.raises(TimeoutError):
                    await run
            else:
                assert (await run).verdict is Verdict.wall_time

    asyncio.run(main())
    assert 0 < ended[0] == ended[1], "it wrote nothing more"


def test_a_timeout_of_asyncio_is_for_the_start_too(monkeypatch: pytest.MonkeyPatch) -> None:
    jail = Jail("untrusted")
    start = jail.start

    def slowly(*args: Any, **options: Any) -> Process:
        time.sleep(0.6 * PATIENCE)
        return start(*args, **options)

    monkeypatch.setattr(jail, "start", slowly)
    began = time.monotonic()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await aio.run(["/bin/true"], policy=jail, timeout=0.1)
        assert time.monotonic() - began < 0.5 * PATIENCE

    asyncio.run(main())


def test_cancelling_a_stream_kills_the_run() -> None:
    async def main() -> Verdict:
        process = await asyncio.to_thread(Jail("untrusted").start, ["/bin/sleep", "20"], stdout=PIPE)

        async def read() -> None:
            with process:
                async for _ in aio.stream(process):
                    pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(), 0.2)
        return process.wait().verdict

    assert asyncio.run(main()) is Verdict.killed


@pytest.mark.parametrize("how", ["dropped", "kept", "closed", "cancelled"])
def test_who_leaves_a_stream_of_asyncio_has_the_rest_by_communicate(how: str) -> None:
    """While there is output and input still to come."""
    source = "import sys\nprint('first', flush=True)\nprint(len(sys.stdin.read()), flush=True)\nprint('end', file=sys.stderr)"
    data = b"x" * 1_000_000

    async def main() -> None:
        with await asyncio.to_thread(Jail("untrusted").start_python, source, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
            if how == "dropped":
                async for piece in aio.stream(process, data):
                    first = piece
                    break
            else:
                pieces = aio.stream(process, data)
                first = await anext(pieces)
                if how == "closed":
                    await pieces.aclose()
                elif how == "cancelled":
                    task = asyncio.ensure_future(anext(pieces))
                    await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
            result = await asyncio.wait_for(aio.communicate(process), 20 * PATIENCE)
            assert (first, result.stdout, result.stderr) == (("stdout", b"first\n"), b"1000000\n", b"end\n")

    asyncio.run(main())


def test_asyncio_runs_in_a_jail_that_is_there_already() -> None:
    async def main(jail: Jail) -> list[bytes]:
        results = await asyncio.gather(*(aio.run_python(f"print({n})", policy=jail) for n in range(20)))
        with pytest.raises(PolicyError, match="memory"):
            await aio.run(["/bin/true"], policy=jail, memory="1G")
        return [result.check().stdout for result in results]

    with Jail("untrusted", preload=[]) as jail:
        assert asyncio.run(main(jail)) == [b"%d\n" % n for n in range(20)]


@pytest.mark.parametrize("warm", [False, True])
def test_the_timeline_has_every_step_and_adds_up(warm: bool) -> None:
    with Jail("untrusted", preload=[] if warm else None) as jail:
        jail.run_python("pass").check()
        begin = time.monotonic()
        result = jail.run_python("import time; time.sleep(0.2)").check()
        whole = time.monotonic() - begin
    assert list(result.timeline) == ["request", "cell", "run", "clear", "report"]
    assert all(spent >= 0 for spent in result.timeline.values()), result.timeline
    assert sum(result.timeline.values()) / 1e6 <= whole and abs(result.timeline["run"] / 1e6 - result.wall_time) < 0.001
    assert abs(result.timeline["cell"] / 1e6 - result.setup_time) < 0.001


def test_a_run_that_is_killed_has_a_timeline_too() -> None:
    result = nsjail_py.run(["/bin/sleep", "9"], wall_time=0.2)
    assert result.timeline["run"] > 150_000 and all(spent >= 0 for spent in result.timeline.values())


SINGLE = """
import array, fcntl, os, termios
left = array.array('i', [0])
for _ in range(5000):
    os.write(1, b'x')
    while fcntl.ioctl(1, termios.FIONREAD, left) or left[0]: pass
"""


def test_output_that_comes_byte_by_byte_takes_its_reader_no_more_than_its_size() -> None:
    process = nsjail_py.Jail("untrusted", cpu_time=30 * PATIENCE, wall_time=60 * PATIENCE).start_python(SINGLE, stdout=nsjail_py.PIPE)
    exchange = process.exchange()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        while not process.reported:
            exchange.wait(None)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert process.wait().check().stdout == b"x" * 5000 and after - before < 10 * 5000
