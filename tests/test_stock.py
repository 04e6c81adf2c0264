"""Jails that wait in stock: faster to start, and otherwise like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE

import nsjail_py
from nsjail_py import Jail, PolicyError, Result, launcher


def cells() -> list[int]:
    """The inits of all jails that there are, in stock or not."""
    pid = launcher.current().pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def parked(init: int) -> bool:
    """Whether its program's process waits for an order."""
    try:
        program = int(Path(f"/proc/{init}/task/{init}/children").read_text() or 0)
        return program > 0 and "Seccomp:\t2" in Path(f"/proc/{program}/status").read_text()
    except OSError:
        return False


class Stocked:
    """A jail under a policy of its own, with `waiting` in stock for /bin/cat."""

    def __init__(self, stock: int, **changes: float) -> None:
        self.jail = Jail("untrusted", stock=stock, hostname=f"stock-{time.monotonic_ns()}", **changes)
        self.before = set(cells())
        assert self.cat(b"1") == b"1"
        assert until(lambda: set(cells()) <= self.before), "one run makes no stock"
        assert self.cat(b"2") == b"2"
        assert until(lambda: len(self.waiting) == stock)

    @property
    def waiting(self) -> set[int]:
        return {init for init in set(cells()) - self.before if parked(init)}

    def cat(self, text: bytes) -> bytes:
        return self.jail.run(["/bin/cat"], input=text).check().stdout


@pytest.fixture
def stocked() -> Stocked:
    return Stocked(2)


def test_one_run_makes_no_stock_and_the_second_does(stocked: Stocked) -> None:
    assert len(stocked.waiting) == 2


def test_a_jail_in_stock_is_taken_and_replaced(stocked: Stocked) -> None:
    waiting = stocked.waiting
    process = stocked.jail.start(["/bin/cat"], stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE)
    assert process.pid is not None
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert parent in waiting
    assert process.communicate(b"text").check().stdout == b"text"
    assert until(lambda: len(stocked.waiting) == 2)
    assert parent not in stocked.waiting


def test_no_jail_is_used_twice() -> None:
    jail = Jail("untrusted", stock=2, hostname="once")
    source = "import os\nopen('/work/here', 'x'), open('/tmp/here', 'x'), open('/dev/shm/here', 'x')\nprint(sorted(os.listdir('/work')))"
    for _ in range(6):
        result = jail.run_python(source)
        assert (result.verdict, result.stdout) == ("ok", b"['here']\n"), result.stderr
        time.sleep(0.02)


def test_the_first_run_and_those_from_stock_are_protected_alike() -> None:
    source = (
        "import os\n"
        "print(open('/proc/self/status').read().split('Cap', 1)[1].split('Cpus')[0])\n"
        "print(sorted(os.environ), os.getcwd(), os.getpid(), os.uname().nodename, sorted(os.listdir('/')), os.listdir('/proc/self/fd'))\n"
        "for name in ('/', '/usr', '/app', '/etc'):\n"
        "    try: open(name + '/x', 'w')\n"
        "    except OSError as error: print(name, error.errno)\n"
        "try: os.execv('/bin/true', ['true'])\n"
        "except OSError as error: print('exec', error.errno)\n"
        "import resource; print([resource.getrlimit(kind) for kind in range(16)])\n"
        "print([line.split()[4:6] for line in open('/proc/self/mountinfo')])\n"
    )
    jail = Jail("untrusted", stock=1, hostname="alike")
    results: list[Result] = []
    for _ in range(4):
        results.append(jail.run_python(source).check())
        assert until(lambda: len(results) == 1 or any(map(parked, cells())))
    for result in results[1:]:
        assert result.stdout == results[0].stdout
        assert result.protections == results[0].protections


def test_a_plan_in_use_keeps_its_stock_whatever_other_plans_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MAX_PLANS", 3)
    stocked = Stocked(1)
    for number in range(6):
        nsjail_py.run(["/bin/true"], hostname=f"other-{number}-{time.monotonic_ns()}").check()
        waiting = stocked.waiting
        assert stocked.cat(b"text") == b"text"
        assert not waiting & stocked.waiting, "it was taken"
        assert until(lambda: len(stocked.waiting) == 1)


def test_jails_in_stock_are_gone_ten_seconds_after_the_last_run(stocked: Stocked) -> None:
    waiting = stocked.waiting
    assert until(lambda: not waiting & set(cells()), seconds=12)
    assert stocked.cat(b"3") == b"3"


def test_a_jail_that_is_killed_in_stock_is_replaced_and_costs_no_run(stocked: Stocked) -> None:
    killed = stocked.waiting
    for init in killed:
        os.kill(init, signal.SIGKILL)
    assert until(lambda: not killed & set(cells()))
    for turn in range(4):
        assert stocked.cat(b"%d" % turn) == b"%d" % turn
    assert until(lambda: len(stocked.waiting) == 2)


def test_a_run_that_meets_a_stopped_jail_is_held_to_its_limits() -> None:
    stocked = Stocked(1)
    for init in stocked.waiting:
        os.kill(int(Path(f"/proc/{init}/task/{init}/children").read_text()), signal.SIGSTOP)
    process = stocked.jail.start(["/bin/cat"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    process.kill()
    assert process.wait(timeout=5 * PATIENCE).verdict == "killed"


def test_what_may_change_on_the_host_is_looked_at_anew(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    jail = Jail("untrusted", stock=2, mounts=[{"source": str(shown), "target": "/shown"}])
    for number in range(5):
        (tmp_path / "fresh").write_text(str(number))
        (tmp_path / "fresh").replace(shown)  # another file by the same name, as editors and compilers write
        assert jail.run(["/bin/cat", "/shown"]).stdout == str(number).encode()
        time.sleep(0.02)


def test_a_program_that_is_compiled_again_is_the_new_one(tmp_path: Path) -> None:
    jail, program = Jail("untrusted", stock=2), tmp_path / "program"
    for number in range(4):
        (tmp_path / "fresh").write_text(f"#!/bin/echo {number}\n")
        (tmp_path / "fresh").chmod(0o755)
        (tmp_path / "fresh").replace(program)
        assert jail.run([str(program)]).stdout.split()[0] == str(number).encode()
        time.sleep(0.02)


def test_a_burst_larger_than_the_stock_is_served_whole(stocked: Stocked) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: results.append(stocked.cat(b"%d" % n))) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(b"%d" % n for n in range(16))


def test_the_clock_of_a_run_from_stock_starts_with_the_run() -> None:
    stocked = Stocked(1, wall_time=1.5 * PATIENCE)
    time.sleep(1.6 * PATIENCE)  # longer than its limit, shorter than a stock is kept
    process = stocked.jail.start(["/bin/cat"], stdin=nsjail_py.PIPE)
    time.sleep(0.1 * PATIENCE)
    result = process.communicate(b"")
    assert (result.verdict, 0.09 < result.wall_time < 1.4 * PATIENCE) == ("ok", True)
    assert until(lambda: len(stocked.waiting) == 1)
    assert stocked.jail.start(["/bin/cat"], stdin=nsjail_py.PIPE).wait().verdict == "wall_time"


@pytest.mark.parametrize("stock", [-1, 65])
def test_a_stock_out_of_range_is_an_error(stock: int) -> None:
    with pytest.raises(PolicyError, match="from 0 to 64"):
        Jail("untrusted", stock=stock)
