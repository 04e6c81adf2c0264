"""How fast: every figure that the project promises, and the others beside it, in one run.

    ./dev bench [--peers] [--rounds N] [--only PART ...] [--leaks JOBS] [--results DIR]

What is compared takes its turns in rounds, so that noise meets all alike; medians and ratios count. Writes DIR/bench.json, bench.png and
bench.svg, and prints one table with the targets. --peers installs first what apt and PyPI have of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import audit
import limits
import plot
import start
import steady
import warm
from peers import Once, Peer
from rows import Row, record, table
from tqdm import tqdm

import nsjail_py

PAUSE = 0.005
"""Seconds between two: what the one has left to the kernel is not to be paid by the next."""
THREADS = 8
PARTS: dict[str, tuple[ModuleType, float]] = {"start": (start, 1.0), "warm": (warm, 0.7), "steady": (steady, 0.1)}
"""What is measured in turns, and how many of the rounds each gets."""
TARGETS = (*start.TARGETS, *warm.TARGETS, *steady.TARGETS, *limits.TARGETS, *audit.TARGETS)
HERE = Path(__file__).parent


def in_turns(part: str, found: dict[str, Peer], rare: set[str], rounds: int) -> list[Row]:
    """Each contestant once in a round, slow ones in every tenth. One that cannot run here is left out, with its reason."""
    rows = {}
    for name, peer in found.items():
        try:
            for _ in range(3):
                peer.once()
        except (SystemExit, OSError, nsjail_py.JailError) as error:
            tqdm.write(f"left out: {name}: {error}")
        else:
            rows[name] = Row(part, name, [], "ms", peer.protections)
    for number in tqdm(range(rounds), desc=part, unit="round", leave=False):
        for name, row in rows.items():
            if name in rare and number % 10:
                continue
            time.sleep(PAUSE)
            begin = time.perf_counter()
            own = found[name].once()
            row.samples.append(own if isinstance(own, float) else (time.perf_counter() - begin) * 1000)
    return list(rows.values())


def rate(once: Once, seconds: float) -> float:
    """How many in a second, from several threads."""
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


def rates(module: ModuleType, rounds: int) -> list[Row]:
    with ExitStack() as stack:
        return [
            Row(
                "sustained",
                name,
                [rate(peer.once, 1.0) for _ in tqdm(range(max(3, rounds // 40)), desc=name, leave=False)],
                "a second",
                peer.protections,
            )
            for name, peer in module.rates(stack).items()
        ]


def turns(part: str, rounds: int) -> list[Row]:
    module, share = PARTS[part]
    with ExitStack() as stack:
        return in_turns(part, module.contestants(stack), module.RARE, max(3, int(rounds * share)))


def late(rounds: int) -> list[Row]:
    with tqdm(desc="limits", unit="run", leave=False) as bar:
        return list(limits.lateness(max(5, rounds // 10), bar.update))


def measures(rounds: int) -> dict[str, Callable[[], list[Row]]]:
    """Everything by its name for --only."""
    return {
        **{part: (lambda part=part: turns(part, rounds)) for part in PARTS},
        "rates": lambda: rates(start, rounds) + rates(warm, rounds),
        "memory": warm.memory,
        "limits": lambda: late(rounds),
        "audit": lambda: audit.rows(max(8, rounds // 5)),
    }


def machine() -> dict[str, object]:
    model = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "kernel": platform.release(),
        "processors": f"{os.cpu_count()} x {model[0] if model else platform.machine()}",
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "an ordinary user",
        "nsjail_py": nsjail_py.__version__,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument(
        "--only", action="append", choices=[*measures(1)], metavar="PART", help=f"{', '.join(measures(1))}; again for more"
    )
    options.add_argument("--leaks", type=int, default=0, metavar="JOBS", help="what so many warm jobs, and a fifth as many cells, leave")
    options.add_argument("--results", type=Path, default=HERE / "results")
    chosen = options.parse_args()
    rows: list[Row] = []
    for name, measure in measures(chosen.rounds).items():
        if not chosen.only or name in chosen.only:
            rows += measure()
    about = machine()
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(table(rows, TARGETS))
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "bench.json").write_text(json.dumps(record(rows, TARGETS, about), indent=1) + "\n")
    plot.draw(rows, about, chosen.results)
    if chosen.leaks:
        print(warm.leaks(chosen.leaks))


if __name__ == "__main__":
    main()
