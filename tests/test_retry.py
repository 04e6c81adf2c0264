"""What was killed before a program ran in it costs no run; and no program runs twice."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE
from test_stock import Stocked, cells, until
from test_warm import template_of

from nsjail_py import Jail, SetupError, aio, launcher


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def warm() -> Iterator[Jail]:
    """One job of it waits."""
    with Jail("untrusted", preload=[], stock=1, hostname=f"retry-{time.monotonic_ns()}") as jail:
        for _ in range(2):
            jail.run_python("1").check()
        yield jail


def waiting(template: int) -> int:
    """The init of the job that waits for its order: its process sleeps behind the filter."""
    found: list[int] = []

    def ready() -> bool:
        found[:] = [init for init in children(template) if children(init)]
        status = [Path(f"/proc/{children(init)[0]}/status").read_text() for init in found]
        return len(status) == 1 and "Seccomp:\t2" in status[0] and "State:\tS" in status[0]

    assert until(lambda: _told(ready), seconds=5 * PATIENCE)
    return found[0]


def _told(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except (OSError, IndexError):  # it has just ended
        return False


def unless_begun(attempt: Callable[[], bytes]) -> bytes | None:
    try:
        return attempt()
    except SetupError as error:
        if not error.began:
            raise
        return None


def session(jail: Jail) -> bytes:
    with jail.session() as it:
        return it.run("print(7)").stdout


def executor(jail: Jail) -> bytes:
    from nsjail_py.executor import _call, pickler

    return b"%d\n" % _call(jail, pickler()((divmod, (15, 2), {})))[0]


def run_python(jail: Jail) -> bytes:
    return jail.run_python("print(7)").check().stdout


def run_under_asyncio(jail: Jail) -> bytes:
    return asyncio.run(aio.run_python("print(7)", policy=jail)).check().stdout


WAYS: list[Callable[[Jail], bytes]] = [run_python, run_under_asyncio, session, executor]


def test_a_run_right_behind_the_kill_of_all_jails_in_stock_is_made_unless_its_program_was_killed_too() -> None:
    """A jail that is being killed may still exec."""
    stocked = Stocked(2)
    for turn in range(8):
        killed = stocked.waiting
        for init in killed:
            os.kill(init, signal.SIGKILL)
        assert unless_begun(lambda turn=turn: stocked.cat(b"%d" % turn)) in (b"%d" % turn, None)
        assert until(lambda killed=killed: not killed & set(cells()), seconds=5 * PATIENCE)
        assert stocked.cat(b"more") == b"more"  # for what dies in stock none is made before the next request
        assert until(lambda: len(stocked.waiting) == 2, seconds=5 * PATIENCE)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_right_behind_the_kill_of_an_idle_template_is_made_unless_its_program_was_killed_too(way: Callable[[Jail], bytes]) -> None:
    """A job that waits outlives its template by a moment, in which it may take an order."""
    with Jail("untrusted", preload=["cloudpickle", "msgspec"], stock=1, hostname=f"retry-{time.monotonic_ns()}") as jail:
        for _ in range(5):
            assert way(jail) == b"7\n"
            os.kill(template_of(launcher.current().pid), signal.SIGKILL)
            assert unless_begun(lambda: way(jail)) in (b"7\n", None)


def stopped(jail: Stocked | Jail) -> int:
    """The process of the one that waits, which does not take the order that it is about to get."""
    if isinstance(jail, Stocked):
        [init] = jail.waiting
    else:
        init = waiting(template_of(launcher.current().pid))
    [program] = children(init)
    os.kill(program, signal.SIGSTOP)
    assert until(lambda: "State:\tT" in Path(f"/proc/{program}/status").read_text(), seconds=5 * PATIENCE)
    return program


@pytest.mark.parametrize("kind", ["a cell", "a job"])
def test_a_program_that_was_killed_before_it_took_its_order_has_not_run(kind: str, warm: Jail) -> None:
    stocked = Stocked(1) if kind == "a cell" else None
    program = stopped(stocked or warm)
    process = stocked.jail.start(["/bin/cat"]) if stocked else warm.start_python("1")
    with process:
        time.sleep(0.2)
        os.kill(program, signal.SIGKILL)
        with pytest.raises(SetupError, match=r"^lost") as caught:
            process.wait(timeout=5 * PATIENCE)
    assert not caught.value.began


@pytest.mark.parametrize("kind", ["a cell", "a job"])
def test_its_run_is_made_in_another(kind: str, warm: Jail) -> None:
    stocked = Stocked(1) if kind == "a cell" else None
    program = stopped(stocked or warm)
    killer = threading.Timer(0.2, os.kill, (program, signal.SIGKILL))
    killer.start()
    assert (stocked.cat(b"7\n") if stocked else run_python(warm)) == b"7\n"
    killer.join()


@pytest.mark.parametrize("kind", ["a cell", "a job"])
def test_a_program_that_has_begun_is_not_run_again(kind: str, warm: Jail) -> None:
    """It takes one of two bytes before its jail is killed from outside; the other stays."""
    jail = Jail("untrusted") if kind == "a cell" else warm
    theirs, ours = os.pipe()
    os.write(ours, b"12")
    told, tell = os.pipe()
    source = "import os, time; os.read(0, 1); os.write(1, b'x'); time.sleep(60)"
    with open(theirs, "rb", 0), open(ours, "wb", 0), open(told, "rb", 0), open(tell, "wb", 0):
        process = jail.start_python(source, stdin=theirs, stdout=tell)
        assert os.read(told, 1) == b"x"
        os.kill(int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
        with pytest.raises(SetupError, match=r"^lost") as caught:
            process.wait(timeout=5 * PATIENCE)
        assert caught.value.began
        assert os.read(theirs, 2) == b"2"
