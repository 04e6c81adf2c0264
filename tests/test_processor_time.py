"""Processor time: what a program has used from exec on, however late the launcher hears that it runs. The program's own clock is the measure."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest
from conftest import PATIENCE

from nsjail_py import Jail, Result, Verdict

AT_ONCE = 20
"""More than there are processors, so the launcher has to wait for its turn."""
END = 0.02 * PATIENCE
"""What the end of a process may take, of which it cannot tell any more."""
PYTHON = """
import os, time
begin = time.process_time()
while time.process_time() < begin + 0.02: pass
print(begin, time.process_time(), flush=True)
os._exit(0)
"""
C = """
#include <stdio.h>
#include <time.h>
#include <unistd.h>
static double used(void) {
	struct timespec time;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}
int main(void) {
	double begin = used();
	while (used() < begin + 0.02)
		;
	dprintf(1, "%.9f %.9f\\n", begin, used());
	_exit(0);
}
"""
"""The same in a program that is there at once: an interpreter's start would hide a look that comes late."""


@pytest.fixture(scope="module")
def burn(tmp_path_factory: pytest.TempPathFactory) -> str:
    source: Path = tmp_path_factory.mktemp("burn") / "burn.c"
    source.write_text(C)
    subprocess.run(["gcc", "-O1", "-static", "-o", source.with_suffix(""), source], check=True)
    return str(source.with_suffix(""))


def at_once(run: Callable[[], Result]) -> list[Result]:
    for _ in range(2):  # from the second one on there is a stock
        run()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda _: run(), range(3 * AT_ONCE)))


def own(result: Result) -> tuple[float, float]:
    """What its process had used when the program began and when it ended. The first is in part ours: the process is older than the program."""
    begin, end = map(float, result.stdout.split())
    return begin, end


def check(results: list[Result]) -> None:
    """None is charged with less than it has used; and one half at least with no more than its end takes beyond that. A virtual machine that
    has to wait for a processor in the middle of an end counts that, too."""
    figures = [(result.cpu_time, own(result.check())) for result in results]
    assert not [(used, begin, end) for used, (begin, end) in figures if used < end - begin]
    assert median(used - end for used, (_, end) in figures) <= END, figures


def test_a_program_is_charged_with_all_that_it_has_used(burn: str) -> None:
    with Jail("untrusted") as jail:
        check(at_once(lambda: jail.run([burn])))


def test_a_program_from_stock_is_charged_with_all_that_it_has_used() -> None:
    with Jail("untrusted", stock=4) as jail:
        check(at_once(lambda: jail.run_python(PYTHON)))


@pytest.mark.parametrize("stock", [0, 4])
def test_a_job_is_charged_with_all_that_it_has_used_and_not_with_what_made_it(stock: int) -> None:
    with Jail("untrusted", stock=stock, preload=["json"]) as jail:
        results = at_once(lambda: jail.run_python(PYTHON))
    check(results)
    assert median(result.cpu_time - own(result)[1] for result in results) < 0  # its fork and its rehearsal took more than its end


def test_no_program_that_used_more_than_its_limit_is_ok(burn: str) -> None:
    with Jail("untrusted", cpu_time=0.019) as jail:
        assert {result.verdict for result in at_once(lambda: jail.run([burn]))} == {Verdict.cpu_time}


def test_the_shortest_program_has_used_something() -> None:
    with Jail("untrusted", stock=4) as jail:
        assert min(result.cpu_time for result in at_once(lambda: jail.run(["/bin/true"]).check())) > 0


@pytest.mark.parametrize("preload", [None, ["json"]])
def test_user_and_system_time_are_parts_of_processor_time(preload: list[str] | None) -> None:
    with Jail("untrusted", preload=preload) as jail:
        for source in ("pass", "import os\nfor _ in range(20_000): os.stat('/')", "sum(range(1_000_000))"):
            result = jail.run_python(source).check()
            assert min(result.user_time, result.system_time) >= 0 < result.cpu_time
            assert result.user_time + result.system_time == pytest.approx(result.cpu_time, abs=1e-8)
