"""How late a limit of time comes: what was used when it was enforced, less the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rows import Row, Target, protections

from nsjail_py import Jail

SLEEP, BURN = "import time; time.sleep(60)", "while True: pass"
CHILDREN = """
import os
while True:
    if os.fork() == 0:
        for _ in range(100000):
            pass
        os._exit(0)
    os.wait()
"""
CASES = (
    ("wall_time", "untrusted", SLEEP, 0.05),
    ("wall_time", "untrusted", SLEEP, 0.5),
    ("wall_time", "untrusted", SLEEP, 5.0),
    ("cpu_time", "untrusted", BURN, 0.05),
    ("cpu_time", "untrusted", BURN, 0.5),
    ("cpu_time", "untrusted", BURN, 5.0),
    ("cpu_time", "moderate", CHILDREN, 0.5),
)


def name_of(limit: str, source: str, seconds: float) -> str:
    return f"{limit} of {seconds:g} s{', short-lived children' if source == CHILDREN else ''}"


TARGETS = tuple(
    Target(name_of(limit, source, seconds), bound, kind)
    for limit, _, source, seconds in CASES
    for kind, bound in (("most", 5), ("p99", 20))
)


def lateness(rounds: int, step: Callable[[], object]) -> Iterator[Row]:
    """A limit of five seconds takes five: fewer of those."""
    for limit, policy, source, seconds in CASES:
        late = []
        with Jail(policy, **{limit: seconds}) as jail:
            for _ in range(max(3, rounds // 10) if seconds > 1 else rounds):
                result = jail.run_python(source)
                assert result.verdict == limit, result.summary
                late.append((getattr(result, limit) - seconds) * 1000)
                step()
        yield Row("late by", name_of(limit, source, seconds), late, "ms", protections(result))
