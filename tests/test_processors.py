"""How many processors a run may keep busy, and which: limits of its control group, or errors."""

from __future__ import annotations

import os

import pytest
from conftest import PATIENCE
from msgspec.structs import replace

import nsjail_py
from nsjail_py import Jail, PolicyError, Protection, Result, Unavailable, compiled, cpuset, launcher

pytestmark = pytest.mark.usefixtures("leaves_nothing")

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"
BURN_TWICE = "import os\nos.fork()\n" + BURN + "\nif os.getpid() == 2: os.wait()"
OURS = sorted(os.sched_getaffinity(0))


def claim() -> compiled.Host:
    return compiled.Host.of(launcher.current().claim)


@pytest.fixture
def shares() -> None:
    if not claim().quota:
        pytest.skip("no control group with a cpu controller")


@pytest.fixture
def choice() -> None:
    if not claim().cpuset:
        pytest.skip("no control group with a cpuset controller")


def given(result: Result, name: str) -> Protection:
    return next(one for one in result.protections if one.name == name)


@pytest.mark.usefixtures("shares")
def test_a_share_of_a_processor_makes_the_same_work_take_as_much_longer() -> None:
    result = nsjail_py.run_python(BURN.format(0.4), cpus=0.2, wall_time=60 * PATIENCE).check()
    assert result.cpu_time >= 0.4
    assert result.wall_time > 1.5  # 2 s, but for the first tenth and the last
    assert given(result, "cpus").state == "applied"


@pytest.mark.usefixtures("shares")
def test_a_share_is_of_all_processes_together() -> None:
    result = nsjail_py.run_python(BURN_TWICE.format(0.4), policy="moderate", cpus=0.4, wall_time=60 * PATIENCE).check()
    assert result.cpu_time >= 0.8
    assert result.wall_time > 1.5


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("warm", [False, True])
def test_a_run_is_on_the_chosen_processors_and_cannot_leave_them(warm: bool) -> None:
    code = "import os\nprint(os.sched_getaffinity(0))\ntry: os.sched_setaffinity(0, range(64))\nexcept OSError: pass\nprint(os.sched_getaffinity(0))"
    last = OURS[-1]
    with Jail("moderate" if warm else "trusted", cpuset=str(last), preload=["json"] if warm else None) as jail:
        result = jail.run_python(code).check()
    assert result.stdout.decode() == f"{{{last}}}\n{{{last}}}\n"
    assert given(result, "cpuset").state == "applied"


@pytest.mark.usefixtures("choice", "shares")
def test_both_hold_together_and_runs_in_stock_have_them_too() -> None:
    with Jail("trusted", cpuset=str(OURS[0]), cpus=0.5) as jail:
        for _ in range(4):
            result = jail.run_python("import os; print(os.sched_getaffinity(0))").check()
            assert result.stdout.decode() == f"{{{OURS[0]}}}\n"
            assert given(result, "cpus").state == given(result, "cpuset").state == "applied"


def test_what_is_not_asked_for_is_not_there() -> None:
    result = nsjail_py.run(["/bin/true"])
    assert {given(result, name).state for name in ("cpus", "cpuset")} == {"not requested"}
    files = {write.file for write in compiled._cgroup(nsjail_py.policy("untrusted"), claim())}
    assert not {file for file in files if file.startswith("cpu")}


@pytest.mark.usefixtures("choice")
def test_a_processor_that_is_not_ours_is_an_error_and_never_all_of_them() -> None:
    """Version 2 takes any number, and where none of them is there it lets the group run everywhere."""
    wanted = f"{OURS[0]},{cpuset.MOST - 1}"
    with pytest.raises(Unavailable, match=f"cpuset: processors {cpuset.MOST - 1} are not ours"):
        nsjail_py.run(["/bin/true"], cpuset=wanted)
    policy = nsjail_py.policy("untrusted")
    result = nsjail_py.run(["/bin/true"], policy=replace(policy, best_effort=(*policy.best_effort, "cpuset")), cpuset=wanted)
    assert given(result, "cpuset").state == "unavailable" and "not ours" in given(result, "cpuset").reason


@pytest.mark.parametrize("limits", [{"cpus": 1.5}, {"cpuset": "0"}], ids=str)
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_a_host_whose_groups_cannot_is_an_error_unless_the_policy_can_do_without(kind: str, limits: dict[str, object]) -> None:
    host = compiled.Host(kind, "no control group: systemd-run", False, True, 7)
    (name,) = limits
    policy = Jail("untrusted", best_effort=("own_uid", "groups", "cgroup", "swap"), **limits).policy
    with pytest.raises(Unavailable, match=f"{name}: (no control group: systemd-run|our control group has no cpu)"):
        compiled.protections(policy, host)
    lenient = replace(policy, best_effort=(*policy.best_effort, name))
    assert {one.name: one.state for one in compiled.protections(lenient, host)}[name] == "unavailable"
    assert not [write for write in compiled._cgroup(lenient, host) if write.file.startswith("cpu")]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"cpus": 0}, "more than 0"),
        ({"cpus": -1}, "more than 0"),
        ({"cpus": 0.001}, "at least 0.01"),
        ({"cpus": float("nan")}, "more than 0"),
        ({"cpus": 10**9}, "at most 8192"),
        ({"cpus": "all"}, "must be a number"),
        ({"cpuset": ""}, "no list of processors"),
        ({"cpuset": "0-"}, "no list of processors"),
        ({"cpuset": "0,\n1"}, "no list of processors"),
        ({"cpuset": "-1"}, "no list of processors"),
        ({"cpuset": "3-1"}, "a range that is none"),
        ({"cpuset": "0-99999"}, "a range that is none"),
        ({"cpuset": 0}, "must be text"),
    ],
    ids=str,
)
def test_what_is_no_number_or_list_of_processors_is_never_all_of_them(limits: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Jail("untrusted", **limits)
