"""How long it takes to run /bin/true: bare, in this jail, and in others. One interleaved run, so that noise meets all alike.

    ./dev bench [--rounds N] [--json FILE]

Times are wall milliseconds from the call to the end of the program. Only what is installed takes part (apt: bubblewrap; PyPI: sandlock).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nsjail_py

TRUE = "/bin/true"
COMMAND = "nsjail-py exec (whole command)"
PAUSE = 0.005
BWRAP = [
    "--unshare-all",
    "--ro-bind",
    "/usr",
    "/usr",
    "--symlink",
    "usr/lib",
    "/lib",
    "--symlink",
    "usr/lib64",
    "/lib64",
    "--symlink",
    "usr/bin",
    "/bin",
    "--proc",
    "/proc",
    "--dev",
    "/dev",
]


def spawn(command: list[str]) -> Callable[[], None]:
    def once() -> None:
        pid = os.posix_spawn(command[0], command, os.environ)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit(f"{command} failed")

    return once


def sandlock() -> Callable[[], None] | None:
    """Its own API, as an application would use it."""
    try:
        from sandlock import Sandbox
    except (ImportError, OSError):
        return None
    sandbox = Sandbox(fs_readable=["/usr", "/lib", "/lib64", "/bin", "/etc"])

    def once() -> None:
        if not sandbox.run([TRUE]).success:
            raise SystemExit("sandlock failed")

    return once


def contestants() -> dict[str, Callable[[], None]]:
    """A name and one start each. The jails of this project have policies of their own, so that one's stock is not the other's."""
    stocked, cold = nsjail_py.Jail("untrusted", stock=2), nsjail_py.Jail("untrusted", stock=0, hostname="cold")
    found: dict[str, Callable[[], None]] = {
        "posix_spawn, no jail": spawn([TRUE]),
        "nsjail_py API, untrusted": lambda: stocked.run([TRUE]).check() and None,
        "nsjail_py API, untrusted, no stock": lambda: cold.run([TRUE]).check() and None,
    }
    if unshare := shutil.which("unshare"):
        found["unshare -Ufpmnui --mount-proc"] = spawn([unshare, "-Ufpmnui", "--mount-proc", TRUE])
    if bwrap := shutil.which("bwrap"):
        found["bubblewrap --unshare-all"] = spawn([bwrap, *BWRAP, TRUE])
    if once := sandlock():
        found["sandlock API"] = once
    if firejail := shutil.which("firejail"):
        found["firejail --noprofile --net=none"] = spawn([firejail, "--quiet", "--noprofile", "--net=none", "--", TRUE])
    found[COMMAND] = spawn([sys.executable, "-m", "nsjail_py", "exec", "--", TRUE])
    return found


def measure(rounds: int) -> dict[str, list[float]]:
    usable = {}
    for name, once in contestants().items():
        try:
            once()
            usable[name] = once
        except (SystemExit, OSError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in usable}
    for number in range(rounds):
        for name, once in usable.items():
            if name == COMMAND and number % 10:
                continue
            time.sleep(PAUSE)  # what the one before has left to the kernel is not to be paid by the next
            started = time.perf_counter()
            once()
            times[name].append((time.perf_counter() - started) * 1000)
    return times


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=300)
    options.add_argument("--json", type=Path)
    options.add_argument("--heap", type=int, default=0, metavar="MIB", help="hold this much memory meanwhile")
    chosen = options.parse_args()
    heap = bytearray(os.urandom(1) * (chosen.heap << 20))
    times = measure(chosen.rounds)
    bare = statistics.median(times["posix_spawn, no jail"])
    rows = {
        name: {"median_ms": statistics.median(t), "p99_ms": sorted(t)[int(len(t) * 0.99)], "times_bare": statistics.median(t) / bare}
        for name, t in times.items()
    }
    print(
        f"/bin/true, {chosen.rounds} rounds, heap {len(heap) >> 20} MiB, Linux {platform.release()}, {os.cpu_count()} processors, uid {os.getuid()}"
    )
    for name, row in rows.items():
        print(f"  {name:36} median {row['median_ms']:8.2f} ms   p99 {row['p99_ms']:8.2f} ms   {row['times_bare']:6.1f} x bare")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
