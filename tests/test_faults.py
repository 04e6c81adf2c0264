"""Every step fails closed: each call that the launcher, init and the program's process make, failing alone.

The calls are those of a traced run, so one that is new is covered by itself. The launcher is built with a shim that lets one chosen call
fail; where a failure is no error by design, faults/scenarios.py says so and why. `./dev faults` tries every call with every errno.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from conftest import IS_ROOT
from faults.scenarios import SCENARIOS, Take, judge, large, take
from faults.shim import NATIVE, PRETENDED, ROLES, Point, Shim

from nsjail_py import JailError, SetupError, launcher, run

THOROUGH = (errno.ENOMEM, errno.EPERM, errno.EMFILE, errno.EIO, errno.ENOSYS, errno.EACCES)
READ_BACK = {"setgroups": "groups", "setresgid": "identity", "setresuid": "identity", "capset": "capabilities"}
"""Calls that give something up, and the step that looks whether it is gone."""
MAKES_MEMORY = {"malloc", "calloc", "realloc", "reallocarray", "free", "strdup", "asprintf", "fopen", "fdopen", "opendir", "fdopendir"}
NEW_TO = {"shared": (), "own": ("shared",), "ended": ("shared", "own"), "warm": ("shared", "own", "ended")}
"""The suite tries a call once: in the first scenario that makes it."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shim]:
    directory = tmp_path_factory.mktemp("shim")
    genuine = launcher.PROGRAM
    built = Shim(directory)
    launcher.PROGRAM = built.program
    with built.templates():
        yield built
        launcher.shutdown()
    launcher.PROGRAM = genuine
    built.close()


@pytest.fixture(scope="module")
def untroubled(shim: Shim) -> dict[str, Take]:
    return {name: take(shim, scenario, None, 0) for name, scenario in SCENARIOS.items()}


def kind(point: Point) -> tuple[str, str, int]:
    return point.role, point.call, point.sub


def sample(name: str, untroubled: dict[str, Take]) -> list[Point]:
    """One call of each kind. The same ones each time: what is new is looked for by `./dev faults`."""
    known = {kind(point) for other in NEW_TO[name] for point in untroubled[other].log}
    chance = random.Random(name)
    by_kind: dict[tuple[str, str, int], list[Point]] = {}
    for point in untroubled[name].log:
        by_kind.setdefault(kind(point), []).append(point)
    return [chance.choice(points) for key, points in by_kind.items() if key not in known]


def of_a_job(log: list[Point]) -> list[Point]:
    """What the launcher, the template and the job do for the first job of the caller's, which is the third. That a template itself is a
    program like any other, the other scenarios have shown."""
    clones = [number for number, point in enumerate(log) if (point.role, point.call) == ("template", "clone")]
    launchers = [point for point in log[clones[1] : clones[3]] if point.role == "launcher"]
    return launchers + [point for point in log if point.role == "template" or (point.role in ROLES[4:] and point.cell == 3)]


def test_no_clock_that_somebody_can_set_is_asked(shim: Shim, untroubled: dict[str, Take]) -> None:
    """The monotonic one, of which only the timer shows here, and those of processes, which have negative numbers, or 3 for our own."""
    asked = {
        (point.call, point.sub) for taken in untroubled.values() for point in taken.log if "clock_" in point.call or "timerfd" in point.call
    }
    assert {(call, sub) for call, sub in asked if sub >= 0} - {("clock_gettime", 3)} == {("timerfd_create", 1), ("timerfd_settime", 0)}
    assert not {"time", "gettimeofday", "timer_create", "setitimer", "alarm"} & set(shim.calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_call_that_fails_is_an_error_that_starts_nothing_and_leaves_nothing(
    name: str, shim: Shim, untroubled: dict[str, Take], request: pytest.FixtureRequest
) -> None:
    thorough = request.config.getoption("--thorough")
    base = untroubled[name]
    points = sample(name, untroubled)
    if thorough:
        points = list(dict.fromkeys([*(of_a_job(base.log) if name == "warm" else base.log), *points]))
    errors = THOROUGH if thorough else (random.Random(name).choice(THOROUGH),)
    faults = [(point, error) for error in errors for point in points]
    ends: Counter[str] = Counter()
    wrong = []
    for point, error in faults:
        verdict = judge(take(shim, SCENARIOS[name], point, error, base.left), base, name)
        ends[verdict.split(":")[0]] += 1
        if verdict.startswith("WRONG"):
            wrong.append(f"{point} {errno.errorcode[error]}: {verdict}")
    print(f"\n{name}: {len(faults)} faults, {dict(ends)}")
    assert not wrong, "\n".join(wrong)
    assert name != "shared" or ends["typed"] > len(faults) / 4


@pytest.mark.parametrize("call", ["close_range", "chdir", "epoll_create1", "mmap"])
def test_a_launcher_that_can_never_start_is_a_typed_error(call: str, shim: Shim, untroubled: dict[str, Take]) -> None:
    point = next(p for p in untroubled["shared"].log if p.name == call and (p.role, p.cell) == ("launcher", 0))
    launcher.shutdown()
    shim.arm(point._replace(nth=0))
    try:
        for _ in range(5):
            with pytest.raises(JailError):
                run(["/bin/true"])
    finally:
        shim.arm(None)
    assert run(["/bin/true"]).ok


def test_the_program_of_a_cell_that_is_never_made_whole_does_not_run(shim: Shim, untroubled: dict[str, Take]) -> None:
    """Init drops its rights beside the program's process, so it is tried often."""
    for point in [p for p in untroubled["own"].log if p.role == "init" and p.cell == 1 and p.call in ("setresuid", "signalfd")]:
        for _ in range(10):
            taken = take(shim, SCENARIOS["own"], point, errno.EPERM, untroubled["own"].left)
            assert judge(taken, untroubled["own"], "own") == "typed", (point, taken.outcomes, os.uname().release)


def test_a_job_that_cannot_be_watched_or_answered_is_told(shim: Shim, untroubled: dict[str, Take]) -> None:
    """Its channel, its clock, its sockets, its init, its control groups: what is not heard would be waited for without an end."""
    points = [p for p in of_a_job(untroubled["warm"].log) if p.name in ("epoll_ctl:1", "sendmsg") and p.role == "launcher"]
    assert len(points) > 4
    for point in points:
        taken = take(shim, SCENARIOS["warm"], point, errno.ENOSPC, untroubled["warm"].left)
        assert judge(taken, untroubled["warm"], "warm") == "typed", (point, taken.outcomes)


def test_a_job_whose_processes_could_not_be_found_does_not_run(shim: Shim, untroubled: dict[str, Take]) -> None:
    """What it uses is looked at by the number of its init; without one it would seem to use nothing."""
    point = next(p for p in of_a_job(untroubled["warm"].log) if (p.role, p.name) == ("launcher", "open:1"))
    taken = take(shim, SCENARIOS["warm"], point, errno.EMFILE, untroubled["warm"].left)
    assert judge(taken, untroubled["warm"], "warm") == "typed", (point, taken.outcomes)


def test_a_template_whose_memory_cannot_be_mapped_from_a_file_serves_as_it_is(shim: Shim) -> None:
    base = take(shim, large, None, 0)
    for call in ("pread", "pwrite"):
        point = next(point for point in base.log if (point.role, point.call) == ("template", call))
        taken = take(shim, large, point, errno.EIO, base.left)
        assert taken.hit and taken.outcomes == base.outcomes, (point, taken.outcomes)


@pytest.fixture
def another_group() -> Iterator[None]:
    """The launcher has a group beside its own, which no program may keep."""
    kept = os.getgroups()
    if IS_ROOT:
        os.setgroups([*kept, 54321])
    yield
    if IS_ROOT:
        os.setgroups(kept)


@pytest.mark.parametrize("call", [call for call in READ_BACK if IS_ROOT or call == "capset"])
def test_what_is_only_said_to_be_given_up_is_noticed(call: str, shim: Shim, untroubled: dict[str, Take], another_group: None) -> None:
    """In init as in the program's process: the call answers that it has worked, and has not. An ordinary user has no ids to give up."""
    name = call if call != "capset" else "syscall"
    points = {p.role: p for p in untroubled["own"].log if p.cell == 1 and p.call == name and call in (p.call, p.name)}
    assert set(points) == ({"init"} if call == "setgroups" else {"init", "program"})
    for point in points.values():
        end, *later = (taken := take(shim, SCENARIOS["own"], point, PRETENDED)).outcomes
        assert taken.hit
        assert isinstance(end.end, SetupError), end
        assert (end.end.step, end.end.errno, end.output) == (READ_BACK[call], errno.EPERM, ())
        assert all(one.end == ("ok", 0, None, ()) for one in later)


def test_the_launcher_kills_by_descriptor_and_nobody_by_number(shim: Shim, untroubled: dict[str, Take]) -> None:
    """A number may be somebody else's by then. Init's own numbers are those of children that it has not waited for."""
    called = {point.name for taken in untroubled.values() for point in taken.log if point.role == "launcher"}
    assert "pidfd_send_signal" in called
    assert not called & {"kill", "killpg", "tgkill", "tkill", "raise"}


def test_nothing_between_the_clone_and_the_exec_asks_for_memory(shim: Shim) -> None:
    """Rungs of the ladder are files that include ladder.h and are not the launcher's."""
    ladder = {path.stem for path in NATIVE.glob("*.c") if '#include "ladder.h"' in path.read_text()} & set(shim.uses)
    assert {"inside", "mounts", "user", "reaper"} <= ladder
    asking = {name: MAKES_MEMORY & used for name, used in shim.uses.items()}
    assert asking["run"], "the launcher itself does, between two cells"
    assert {name: asking[name] for name in ladder if asking[name]} == {}
