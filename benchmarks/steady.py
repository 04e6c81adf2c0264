"""What a running program pays: the same Python, jailed and not, in turns. The program takes its own time, so that no start counts."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

from peers import Once, Peer
from rows import Target, protections

from nsjail_py import Jail

OPEN = """
import os, time
def missing():
    try:
        os.open("/usr/lib/missing", os.O_RDONLY)
    except FileNotFoundError:
        pass
begin = time.perf_counter()
for _ in range(100_000):
    missing()
print((time.perf_counter() - begin) * 1000)
"""
IMPORT = "import time\nbegin = time.perf_counter()\nimport numpy\nprint((time.perf_counter() - begin) * 1000)"
# Below /usr inside and outside: a file system in memory keeps no note of what it does not have, and would be measured instead.
PROGRAMS = {"100,000 openat of a missing file": OPEN, "import numpy": IMPORT}
TARGETS = tuple(Target(f"{name}, jailed", 1.05, "times", f"{name}, no jail") for name in PROGRAMS)
RARE: set[str] = set()


def contestants(stack: ExitStack) -> dict[str, Peer]:
    jail = stack.enter_context(Jail("untrusted", imports=["numpy"]))
    found = {}
    for name, source in PROGRAMS.items():
        found[f"{name}, no jail"] = Peer(_bare(source), "nothing")
        found[f"{name}, jailed"] = Peer(_jailed(jail, source), protections(jail.run_python("pass")))
    return found


def _bare(source: str) -> Once:
    return lambda: float(subprocess.run([sys.executable, "-I", "-c", source], check=True, capture_output=True).stdout)


def _jailed(jail: Jail, source: str) -> Once:
    return lambda: float(jail.run_python(source).check().stdout)
