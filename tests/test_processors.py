"""How many processors a run may keep busy, and which, and how much of the disks: limits of its control group, or errors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE
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


@pytest.fixture
def disks() -> None:
    if not claim().disks:
        pytest.skip("no control group with an io controller")


@pytest.fixture
def place() -> Iterator[Path]:
    """On a disk, which /tmp may not be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


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


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize("way", ["read", "write"])
def test_a_share_of_the_disks_makes_the_same_bytes_take_as_much_longer(way: str, place: Path) -> None:
    """Past the host's cache, as far as its file system can; else what is written is only written back later."""
    size = 12 << 20
    (place / "data").write_bytes(os.urandom(size))
    os.sync()
    direct = "import mmap, os\nm = mmap.mmap(-1, 1 << 20)\nf = os.open('/work/data', os.O_RDWR | os.O_DIRECT)\n"
    copy = f"for _ in range({size >> 20}): {'os.readv(f, [m])' if way == 'read' else 'os.write(f, m)'}"
    for path in (place, place / "data") if IS_ROOT else ():
        os.chown(path, 12345, 12345)
    jail = Jail("untrusted", workdir=str(place), wall_time=120 * PATIENCE, cpu_time=60 * PATIENCE)
    free = jail.run_python(direct + copy).check()
    result = nsjail_py.run_python(direct + copy, policy=replace(jail.policy, limits=replace(jail.policy.limits, io=2 << 20))).check()
    assert result.wall_time > 4 > free.wall_time / PATIENCE  # 6 s, but for what is handed out at once
    assert given(result, "io").state == "applied" and given(free, "io").state == "not requested"


@pytest.mark.usefixtures("disks")
def test_every_disk_has_the_limit(place: Path) -> None:
    with Jail("moderate", io="20M").start(["/bin/sleep", "60"]) as process:
        assert process.pid
        tops = launcher.current().claim.directories.values()
        groups = [path for top in tops for path in top.glob("cell-*") if (path / "cgroup.procs").read_text()]
        told = [line.split() for group in groups for line in (group / "io.max").read_text().splitlines()]
    assert {line[0] for line in told} == set(claim().disks)
    assert all({"rbps=20971520", "wbps=20971520"} <= set(line) for line in told)


def test_what_is_not_asked_for_is_not_there() -> None:
    result = nsjail_py.run(["/bin/true"])
    assert {given(result, name).state for name in ("cpus", "cpuset", "io")} == {"not requested"}
    files = {write.file for write in compiled._cgroup(nsjail_py.policy("untrusted"), claim())}
    assert not {file for file in files if file.startswith(("cpu", "io"))}


@pytest.mark.usefixtures("choice")
def test_a_processor_that_is_not_ours_is_an_error_and_never_all_of_them() -> None:
    """Version 2 takes any number, and where none of them is there it lets the group run everywhere."""
    wanted = f"{OURS[0]},{cpuset.MOST - 1}"
    with pytest.raises(Unavailable, match=f"cpuset: processors {cpuset.MOST - 1} are not ours"):
        nsjail_py.run(["/bin/true"], cpuset=wanted)
    policy = nsjail_py.policy("untrusted")
    result = nsjail_py.run(["/bin/true"], policy=replace(policy, best_effort=(*policy.best_effort, "cpuset")), cpuset=wanted)
    assert given(result, "cpuset").state == "unavailable" and "not ours" in given(result, "cpuset").reason


@pytest.mark.parametrize("limits", [{"cpus": 1.5}, {"cpuset": "0"}, {"io": "20M"}], ids=str)
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_a_host_whose_groups_cannot_is_an_error_unless_the_policy_can_do_without(kind: str, limits: dict[str, object]) -> None:
    host = compiled.Host(kind, "no control group: systemd-run", False, True, 7)
    (name,) = limits
    policy = Jail("untrusted", best_effort=("own_uid", "groups", "cgroup", "swap"), **limits).policy
    with pytest.raises(
        Unavailable, match=f"{name}: (no control group: systemd-run|our control group has no (cpu|io)|control groups of version 1)"
    ):
        compiled.protections(policy, host)
    lenient = replace(policy, best_effort=(*policy.best_effort, name))
    assert {one.name: one.state for one in compiled.protections(lenient, host)}[name] == "unavailable"
    assert not [write for write in compiled._cgroup(lenient, host) if write.file.startswith(("cpu", "io"))]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"cpus": 0}, "more than 0"),
        ({"cpus": -1}, "more than 0"),
        ({"cpus": 0.001}, "at least 0.01"),
        ({"cpus": float("nan")}, "more than 0"),
        ({"cpus": 10**9}, "at most 8192"),
        ({"cpus": "all"}, "must be a number"),
        ({"io": 0}, "more than 0"),
        ({"io": "1000"}, "at least 1048576"),
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
