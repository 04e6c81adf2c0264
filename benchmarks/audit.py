"""What the audit hook costs: `import numpy` in a jail with it and without, in turns, so that a machine that is busy is so for both.

python benchmarks/audit.py [RUNS]. The program's own processor time counts: the clock on the wall would measure the neighbours."""

from __future__ import annotations

import statistics
import sys

from rows import Row, Target, protections

import nsjail_py

SOURCE = "import numpy"
ROW = "import numpy under the audit hook, of without"
TARGETS = (Target(ROW, 1.05, "most"),)


def measure(runs: int) -> dict[str, list[float]]:
    """Seconds of processor time of each run, by what the policy says about the hook."""
    jails = {audit: nsjail_py.Jail("untrusted", imports=["numpy"], audit=audit) for audit in ("off", "report")}
    taken: dict[str, list[float]] = {audit: [] for audit in jails}
    for number in range(-2, runs):
        for audit, jail in jails.items():
            used = jail.run_python(SOURCE).check().cpu_time
            if number >= 0:
                taken[audit].append(used)
    return taken


def cost(taken: dict[str, list[float]]) -> float:
    """How much more it is with the hook: of the fastest quarter of each, which the neighbours disturbed least."""
    best = {audit: statistics.mean(sorted(times)[: max(1, len(times) // 4)]) for audit, times in taken.items()}
    return best["report"] / best["off"] - 1


def rows(runs: int) -> list[Row]:
    hooked = nsjail_py.run_python(SOURCE, imports=["numpy"], audit="report").check()
    return [Row("audit", ROW, [1 + cost(measure(runs))], "x", protections(hooked))]


if __name__ == "__main__":
    taken = measure(int(sys.argv[1]) if sys.argv[1:] else 60)
    for audit, times in taken.items():
        print(f"audit {audit:7} median {1000 * statistics.median(times):.1f} ms, fastest {1000 * min(times):.1f} ms")
    print(f"the hook costs {100 * cost(taken):.1f} %")
