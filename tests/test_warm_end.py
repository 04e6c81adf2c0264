"""How a warm job ends: its result is told while its process still waits in its last call, if nothing else is left of the run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, descendants

from nsjail_py import PIPE, Jail, launcher

EXIT_GROUP, LAST_CALL = {"x86_64": 231, "aarch64": 94}[os.uname().machine], 0x6C61737463616C6C
ENDS = f"import ctypes\ndef end(status): ctypes.CDLL(None).syscall({EXIT_GROUP}, status, 0, 0, 0, 0, ctypes.c_long({LAST_CALL}))\n"
"""What a job itself calls last, for whoever would call it before."""


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    """Its jobs may have threads and children."""
    with Jail("moderate", preload=["ctypes", "threading"], wall_time=20 * PATIENCE) as jail:
        yield jail


def resident(pid: int) -> int:
    """MiB; 0 when it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return 0


def wait_until(holds: object) -> None:
    assert callable(holds)
    deadline = time.monotonic() + 10 * PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_job_that_is_done_waits_in_the_kernel_for_whoever_tells_its_end() -> None:
    with Jail("untrusted", preload=[], stock=0) as jail, jail.start_python("input()", stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin and process.pid
        call, at = Path(f"/proc/{process.pid}/syscall"), launcher.current().pid
        os.kill(at, signal.SIGSTOP)
        try:
            process.stdin.write(b"go on\n")
            wait_until(lambda: call.read_text().split()[0] == str(EXIT_GROUP))
            time.sleep(0.1)
            assert call.read_text().split()[0] == str(EXIT_GROUP)
        finally:
            os.kill(at, signal.SIGCONT)
        result = process.communicate()
        assert (result.verdict, result.exit_code, result.signal) == ("ok", 0, None)
        assert result.cpu_time > 0 and result.peak_memory > 0
        wait_until(lambda: not call.exists())


def test_the_end_of_a_job_with_much_memory_is_waited_for() -> None:
    """Who runs as many jobs as there is memory for counts on it."""
    with Jail("untrusted", preload=[], stock=0, memory="1G") as jail:
        for _ in range(3):
            jail.run_python("import builtins; builtins.kept = bytearray(b'1') * (300 << 20)").check()
            assert max(map(resident, descendants(launcher.current().pid))) < 200


LEFT = {
    "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "a child": "import os, time\nif not os.fork(): time.sleep(60)",
    "a child that is dead": "import os\nif not os.fork(): os._exit(0)",
    "a grandchild": "import os, time\nif not os.fork():\n    if not os.fork(): time.sleep(60)\n    os._exit(0)\nos.wait()",
}


@pytest.mark.parametrize("what", LEFT)
def test_what_a_job_leaves_is_gone_when_its_end_is_told(what: str, jail: Jail) -> None:
    """All but its own process, in its last call."""
    for _ in range(5):
        with jail.start_python(LEFT[what] + "\nprint('ready', flush=True)\ninput()", stdin=PIPE, stdout=PIPE) as process:
            assert process.stdin and process.stdout and process.pid
            assert process.stdout.read(6) == b"ready\n"
            init = int(
                next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("PPid")).split()[1]
            )
            there = {int(task) for pid in descendants(init) for task in os.listdir(f"/proc/{pid}/task")} - {process.pid}
            assert there
            process.stdin.write(b"go on\n")
            assert process.communicate().exit_code == 0
            assert not [pid for pid in there if Path(f"/proc/{pid}").exists()]


NOT_YET = {
    "a thread of its": ENDS + "import threading\nthreading.Thread(target=end, args=(3,)).start()\nwhile True: pass",
    "its own process, and not with 0": ENDS + "end(3)",
    "its own process, and a child is left": ENDS + "import os, time\nif not os.fork(): time.sleep(60)\nend(3)",
}


@pytest.mark.parametrize("who", NOT_YET)
def test_the_last_call_is_an_end_like_any_other_for(who: str, jail: Jail) -> None:
    result = jail.run_python(NOT_YET[who])
    assert (result.verdict, result.exit_code, result.denied) == ("exit", 3, {})


def test_the_last_call_of_a_child_ends_no_run(jail: Jail) -> None:
    result = jail.run_python(
        ENDS + "import os\nif not (pid := os.fork()): end(0)\nprint(os.waitpid(pid, 0) == (pid, 0))\nraise SystemExit(4)"
    )
    assert (result.exit_code, result.stdout) == (4, b"True\n")


def test_a_signal_that_comes_at_the_end_changes_nothing(jail: Jail) -> None:
    """A handler interrupts the wait for an answer, and the C library takes an exit that returns for a fault."""
    source = "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)"
    for _ in range(30):
        result = jail.run_python(source)
        assert (result.verdict, result.exit_code) == ("ok", 0)


@pytest.mark.parametrize("status", [0, 5])
def test_a_limit_that_was_met_before_is_told_all_the_same(status: int) -> None:
    with Jail("untrusted", preload=[], output=100) as jail:
        assert jail.run_python(f"print('x' * 1000)\nraise SystemExit({status})").verdict == "output"
