"""Warm interpreters and sessions: one run, its memory, how many in a second, how late a limit comes, and what many of them leave.

    ./dev bench warm [--rounds N] [--seconds S] [--leaks JOBS] [--json FILE]

Times are wall milliseconds from the call to the result, in rounds in which each takes its turn, so that noise meets all alike. All jails
have every protection of `untrusted`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_start import PAUSE, spawn

import nsjail_py
from nsjail_py import Jail, launcher

Row = dict[str, float]
NUMPY = "import numpy; numpy.arange(10).sum()"
HEAP = "x = bytearray(b'1' * (100 << 20))"
THREADS = 8


def nothing() -> None:
    """What CPython's own fork server runs."""


def contestants(stack: ExitStack) -> dict[str, Callable[[], Any]]:
    bare = stack.enter_context(Jail("untrusted", preload=[]))
    numpy = stack.enter_context(Jail("untrusted", preload=["numpy"], hostname="numpy"))
    unparked = stack.enter_context(Jail("untrusted", preload=["numpy"], stock=0, hostname="unparked"))
    cold = stack.enter_context(Jail("untrusted", hostname="cold"))
    session = stack.enter_context(numpy.session())
    large = stack.enter_context(numpy.session())
    large.run(HEAP).check()
    large.checkpoint()
    server = multiprocessing.get_context("forkserver")

    def forkserver() -> None:
        process = server.Process(target=nothing)
        process.start()
        process.join()

    return {
        "python3 -I -S -c pass, no jail": spawn([sys.executable, "-I", "-S", "-c", "pass"]),
        "python3 -c 'import numpy', no jail": spawn([sys.executable, "-c", "import numpy"]),
        "CPython's forkserver, no jail": forkserver,
        "run_python, no warm interpreter": lambda: cold.run_python("pass").check(),
        "warm job": lambda: bare.run_python("pass").check(),
        "warm job with numpy": lambda: numpy.run_python(NUMPY).check(),
        "warm job with numpy, none parked": lambda: unparked.run_python(NUMPY).check(),
        "cell of a session": lambda: session.run("1 + 1").check(),
        "checkpoint of 100 MiB": large.checkpoint,
        "restore of 100 MiB": large.restore,
    }


def times(rounds: int) -> dict[str, Row]:
    with ExitStack() as stack:
        found = contestants(stack)
        taken: dict[str, list[float]] = {name: [] for name in found}
        for number in range(rounds + 3):
            for name, once in found.items():
                if "checkpoint" in name and number % 10:  # each one keeps a process
                    continue
                time.sleep(PAUSE)
                begin = time.perf_counter()
                once()
                if number >= 3:
                    taken[name].append((time.perf_counter() - begin) * 1000)
    return {
        name: {"median_ms": statistics.median(each), "p99_ms": sorted(each)[int(len(each) * 0.99)]} for name, each in taken.items() if each
    }


def rates(seconds: float) -> dict[str, Row]:
    def rate(once: Callable[[], Any]) -> float:
        once()
        end, counts = time.monotonic() + seconds, [0] * THREADS

        def work(number: int) -> None:
            while time.monotonic() < end:
                once()
                counts[number] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / seconds

    with Jail("untrusted", stock=16, hostname="rate") as cells, Jail("untrusted", preload=["numpy"], stock=16, hostname="rate") as warm:
        return {
            f"/bin/true, {THREADS} threads": {"per_second": rate(lambda: cells.run(["/bin/true"]).check())},
            f"warm job with numpy, {THREADS} threads": {"per_second": rate(lambda: warm.run_python(NUMPY).check())},
        }


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def private(pid: int) -> int:
    """KiB that would be free without it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def memory(parked: int = 32) -> dict[str, Row]:
    """Of parked numpy jobs: all their processes, the two of each."""
    with Jail("untrusted", preload=["numpy"], stock=1, hostname="memory") as one:
        one.run_python("pass").check()
        one.run_python("pass").check()
        time.sleep(0.5)
        few = sum(map(private, descendants(launcher.current().pid)))
    with Jail("untrusted", preload=["numpy"], stock=parked, hostname="memory") as many:
        many.run_python("pass").check()
        many.run_python("pass").check()
        time.sleep(2)
        processes = descendants(launcher.current().pid)
        return {"a parked numpy job": {"private_kib": (sum(map(private, processes)) - few) / (parked - 1)}}


def lateness(rounds: int) -> dict[str, Row]:
    burn = "while True: pass"
    children = "import os\nwhile True:\n  if os.fork() == 0:\n    for _ in range(100000): pass\n    os._exit(0)\n  os.wait()"
    found = {}
    for name, policy, source, limit in (
        ("wall_time", "untrusted", "import time; time.sleep(60)", 0.05),
        ("wall_time", "untrusted", "import time; time.sleep(60)", 0.5),
        ("cpu_time", "untrusted", burn, 0.05),
        ("cpu_time", "untrusted", burn, 0.5),
        ("cpu_time", "moderate", children, 0.5),
    ):
        late = []
        with Jail(policy, **{name: limit}) as jail:
            for _ in range(rounds):
                result = jail.run_python(source)
                assert result.verdict == name, result.summary
                late.append((getattr(result, name) - limit) * 1000)
        kind = f"{name} {limit} s{', short-lived children' if source is children else ''}"
        found[kind] = {"late_median_ms": statistics.median(late), "late_p99_ms": sorted(late)[int(len(late) * 0.99)]}
    return found


def held() -> Row:
    pid = launcher.current().pid
    status = {
        line.split(":")[0]: line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if ":" in line and len(line.split()) > 1
    }
    own = {
        line.split(":")[0]: line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line and len(line.split()) > 1
    }
    return {
        "launcher_kib": int(status["VmRSS"]),
        "launcher_descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "launcher_children": len(descendants(pid)),
        "caller_kib": int(own["VmRSS"]),
        "caller_descriptors": len(os.listdir("/proc/self/fd")),
    }


def leaks(jobs: int) -> dict[str, Row]:
    """What is held after a first thousand, and after all of them; a fifth as many cells."""
    found = {}
    with Jail("untrusted", preload=[]) as warm, Jail("untrusted") as cells:
        for kind, once, count in (
            ("warm jobs", lambda: warm.run_python("pass").check(), jobs),
            ("cells", lambda: cells.run(["/bin/true"]).check(), jobs // 5),
        ):
            for number in range(1, count + 1):
                once()
                if number in (min(1000, count), count):
                    time.sleep(1)
                    found[f"after {number} {kind}"] = held()
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--leaks", type=int, default=0, metavar="JOBS")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    rows = {}
    print(
        f"Linux {platform.release()}, {os.cpu_count()} processors, uid {os.getuid()}, Python {platform.python_version()}, nsjail_py {nsjail_py.__version__}"
    )
    for part in (
        lambda: times(chosen.rounds),
        lambda: rates(chosen.seconds),
        memory,
        lambda: lateness(max(5, chosen.rounds // 10)),
        lambda: leaks(chosen.leaks) if chosen.leaks else {},
    ):
        for name, row in part().items():
            rows[name] = row
            print(f"  {name:46}", "   ".join(f"{what} {value:10.2f}" for what, value in row.items()), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
