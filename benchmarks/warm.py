"""Python in warm interpreters and sessions, how many jobs in a second, and what a parked one holds."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from peers import FORKED, FORKSERVER, Peer, spawn, timed
from rows import Row, Target, protections

from nsjail_py import Jail, launcher

NUMPY = "import numpy; numpy.arange(10).sum()"
PANDAS = "import pandas; pandas.Series(range(10)).sum()"
HEAP = "x = bytearray(b'1' * (100 << 20))"
BARE, IMPORT = "python3 -I -S -c pass, no jail", "python3 -c 'import numpy', no jail"
JOB, NUMPY_JOB, UNPARKED = "warm job", "warm job with numpy", "warm job with numpy, none parked"
PANDAS_JOB = "warm job with pandas"
CHECKPOINT, RESTORE = "checkpoint of 100 MiB", "restore of 100 MiB"
RATE, PARKED = "warm job with numpy, 8 threads", "a parked numpy job, private"
TARGETS = (
    Target(JOB, 0.5, "most"),
    Target(JOB, 2, "p99"),
    Target(JOB, 15, "faster", BARE),
    Target(NUMPY_JOB, 0.5, "most"),
    Target(NUMPY_JOB, 150, "faster", IMPORT),
    Target(UNPARKED, 1.8, "most"),
    Target(CHECKPOINT, 5, "most"),
    Target(RESTORE, 5, "most"),
    Target(RATE, 800, "least"),
    Target(PARKED, 0.8, "most"),
)
RARE = {IMPORT, CHECKPOINT, RESTORE}
"""A checkpoint keeps a process; the other is slow."""


def contestants(stack: ExitStack) -> dict[str, Peer]:
    bare = stack.enter_context(Jail("untrusted", preload=[]))
    numpy = stack.enter_context(Jail("untrusted", preload=["numpy"], hostname="numpy"))
    pandas = stack.enter_context(Jail("untrusted", preload=["numpy", "pandas"], hostname="pandas"))
    unparked = stack.enter_context(Jail("untrusted", preload=["numpy"], stock=0, hostname="unparked"))
    cold = stack.enter_context(Jail("untrusted", hostname="cold"))
    session = stack.enter_context(numpy.session())
    large = stack.enter_context(numpy.session())
    large.run(HEAP).check()
    large.checkpoint()
    of_job, of_numpy, of_pandas, of_unparked = (protections(jail.run_python("pass")) for jail in (bare, numpy, pandas, unparked))
    return {
        BARE: Peer(spawn([sys.executable, "-I", "-S", "-c", "pass"]), "nothing"),
        IMPORT: Peer(spawn([sys.executable, "-c", "import numpy"]), "nothing"),
        "CPython's forkserver, no jail": Peer(timed(stack, FORKSERVER), "nothing"),
        "a fork that waits, no jail": Peer(timed(stack, FORKED, "pass"), "nothing"),
        "a fork with numpy that waits, no jail": Peer(timed(stack, FORKED, NUMPY), "nothing"),
        "run_python, no warm interpreter": Peer(lambda: cold.run_python("pass").check() and None, protections(cold.run_python("pass"))),
        JOB: Peer(lambda: bare.run_python("pass").check() and None, of_job),
        NUMPY_JOB: Peer(lambda: numpy.run_python(NUMPY).check() and None, of_numpy),
        PANDAS_JOB: Peer(lambda: pandas.run_python(PANDAS).check() and None, of_pandas),
        UNPARKED: Peer(lambda: unparked.run_python(NUMPY).check() and None, of_unparked),
        "cell of a session": Peer(lambda: session.run("1 + 1").check() and None, f"{of_numpy}; its cells share an interpreter"),
        CHECKPOINT: Peer(large.checkpoint, of_numpy),
        RESTORE: Peer(large.restore, of_numpy),
    }


def rates(stack: ExitStack) -> dict[str, Peer]:
    warm = stack.enter_context(Jail("untrusted", preload=["numpy"], stock=16, hostname="rate"))
    return {RATE: Peer(lambda: warm.run_python(NUMPY).check() and None, protections(warm.run_python(NUMPY)))}


def memory(parked: int = 32) -> list[Row]:
    """Of parked numpy jobs: all their processes, the two of each."""

    def held(stock: int) -> tuple[float, str]:
        with Jail("untrusted", preload=["numpy"], stock=stock, hostname=f"memory{stock}") as jail:
            results = [jail.run_python("pass").check() for _ in range(2)]
            time.sleep(2)
            return sum(map(private, descendants(launcher.current().pid))), protections(results[-1])

    few, _ = held(1)
    many, had = held(parked)
    return [Row("memory", PARKED, [(many - few) / (parked - 1) / 1024], "MiB", had)]


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def private(pid: int) -> int:
    """KiB that would be free without it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def leaks(jobs: int) -> str:
    """What launcher and caller hold after a first thousand, and after all of them; a fifth as many cells."""
    lines = []
    with Jail("untrusted", preload=[]) as warm, Jail("untrusted") as cells:
        for kind, once, count in (
            ("warm jobs", lambda: warm.run_python("pass").check(), jobs),
            ("cells", lambda: cells.run(["/bin/true"]).check(), jobs // 5),
        ):
            for number in range(1, count + 1):
                once()
                if number in (min(1000, count), count):
                    time.sleep(1)
                    pid = launcher.current().pid
                    held = [
                        f"{who}: {_resident(of)} KiB, {len(os.listdir(f'/proc/{of}/fd'))} descriptors"
                        for who, of in (("launcher", pid), ("caller", os.getpid()))
                    ]
                    lines.append(f"after {number} {kind}: {'; '.join(held)}; {len(descendants(pid))} processes")
    return "\n".join(lines)


def _resident(pid: int) -> int:
    return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
