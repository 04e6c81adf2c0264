"""Control groups: what is ours is found and made, and removed again; what is not ours is never touched."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE, ROOT
from hypothesis import given
from hypothesis import strategies as st

import nsjail_py
from nsjail_py import cgroups, launcher, mountinfo

NOBODY = 65534
KERNEL = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
DEAD = 4_194_305
"""No process has this number: it is above the largest that Linux gives."""

LINE = "36 25 0:32 {root} {target} rw,nosuid shared:7 master:2 - cgroup2 cgroup rw,nsdelegate"


def entry(root: str, target: Path, kind: str = "cgroup2", options: str = "rw") -> mountinfo.Entry:
    return mountinfo.Entry(root, str(target), frozenset(options.split(",")), kind, frozenset({"rw"}))


def escaped(path: str) -> str:
    """A path as the kernel writes it."""
    return "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in path)


def directory(parent: Path, pid: int, start: str, namespace: int | None = None) -> Path:
    """A claim's directory, as the process `pid` would have named it."""
    path = parent / f"nsjail_py.{pid}.{start}.{namespace or cgroups._view()}.0123abcd"
    path.mkdir()
    return path


@pytest.fixture
def claim() -> Iterator[cgroups.Claim]:
    made = cgroups.claim()
    yield made
    cgroups.release(made)


# ---------------------------------------------------------------- what /proc says


def test_a_line_of_every_version_is_understood() -> None:
    text = "9:name=systemd:/init\n4:memory:/a:b/c\n2:cpu,cpuacct:/x (deleted)\n0::/user.slice\n"
    assert cgroups.memberships(text) == [
        cgroups.Membership(("name=systemd",), "/init"),
        cgroups.Membership(("memory",), "/a:b/c"),
        cgroups.Membership(("cpu", "cpuacct"), "/x (deleted)"),
        cgroups.Membership((), "/user.slice"),
    ]


@given(st.text(alphabet="ab /\\\t\n0134", min_size=1))
def test_a_mount_of_any_name_is_found(name: str) -> None:
    (found,) = mountinfo.parse(LINE.format(root="/", target=escaped("/" + name)) + "\n")
    assert (found.target, found.kind) == ("/" + name, "cgroup2")
    assert "nsdelegate" in found.super_options
    assert not found.read_only


def test_lines_that_are_cut_are_left_out() -> None:
    assert mountinfo.parse("36 25 0:32 / /sys rw - cgroup2\n\n36 25\n") == []


def test_the_group_is_seen_through_a_mount_of_a_part_of_the_hierarchy(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    assert cgroups.visible("/docker/1/inner", [entry("/docker/1", tmp_path)]) == tmp_path / "inner"
    assert cgroups.visible("/docker/1", [entry("/docker/1", tmp_path)]) == tmp_path
    assert cgroups.visible("/docker/12", [entry("/docker/1", tmp_path)]) is None, "a longer name is another group"
    assert cgroups.visible("/docker/1/gone", [entry("/docker/1", tmp_path)]) is None


def test_a_group_outside_of_our_namespace_is_not_followed_upwards(tmp_path: Path) -> None:
    assert cgroups.visible("/../inner", [entry("/", tmp_path)]) is None


def test_a_writable_mount_is_preferred(tmp_path: Path) -> None:
    for name in ("frozen", "free"):
        (tmp_path / name).mkdir()
    free, frozen = entry("/", tmp_path / "free"), entry("/", tmp_path / "frozen", options="ro")
    assert cgroups.visible("/", [free, frozen]) == cgroups.visible("/", [frozen, free]) == tmp_path / "free"


# ---------------------------------------------------------------- claim and release


def test_a_claim_names_its_directories_or_says_why_there_are_none(claim: cgroups.Claim) -> None:
    keys = {"v1": {"memory", "pids"}, "v2": {"unified"}, "none": set[str]()}[claim.kind]
    assert keys <= set(claim.directories) <= keys | ({"cpu", "quota", "cpuset"} if claim.kind == "v1" else set())
    assert all(path.is_dir() for path in claim.directories.values())
    assert claim.kind != "none" or claim.why
    assert (claim.mode == "root") == IS_ROOT


def test_every_directory_lies_below_a_group_of_its_hierarchy_and_bears_our_number(claim: cgroups.Claim) -> None:
    for path in claim.directories.values():
        assert path.name.startswith(f"nsjail_py.{os.getpid()}.")
        assert (path.parent / "cgroup.procs").exists()
        assert (path / "cgroup.procs").read_text() == "", "no process is moved into it"


def test_the_directories_have_the_files_that_limits_are_written_to(claim: cgroups.Claim) -> None:
    files = {
        "memory": "memory.limit_in_bytes",
        "pids": "pids.max",
        "cpu": "cpuacct.usage",
        "quota": "cpu.cfs_quota_us",
        "cpuset": "cpuset.cpus",
        "unified": "memory.max",
    }
    for key, path in claim.directories.items():
        assert (path / files[key]).exists()


def test_release_leaves_nothing_and_may_be_repeated() -> None:
    claim = cgroups.claim()
    for path in claim.directories.values():
        (path / "cell-7").mkdir()
    for _ in range(2):
        cgroups.release(claim)
        assert not [path for path in claim.directories.values() if path.exists()]


def test_two_claims_do_not_meet(claim: cgroups.Claim) -> None:
    other = cgroups.claim()
    assert not set(other.directories.values()) & set(claim.directories.values())
    cgroups.release(other)
    assert all(path.is_dir() for path in claim.directories.values()), "the release of one leaves the other"


@pytest.mark.skipif(not IS_ROOT, reason="only root can become somebody else")
def test_without_delegation_a_user_gets_no_group_but_a_reason_and_a_remedy() -> None:
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        found = cgroups.claim()
        os.write(write_end, repr((found.kind, found.mode, bool(found.why), bool(found.remedy))).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        assert answer.read().decode() == "('none', 'rootless', True, True)"
    os.waitpid(child, 0)


def test_the_next_claim_removes_what_a_killed_process_left() -> None:
    code = "import os; from nsjail_py import cgroups; print(*cgroups.claim().directories.values(), sep='\\n', flush=True); os._exit(9)"
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.splitlines()
    left = [path for path in left if path]  # none, where there is no group to be had
    cgroups.release(cgroups.claim())
    assert not [path for path in left if Path(path).exists()]


# ---------------------------------------------------------------- runs


def test_each_run_has_a_peak_of_its_own() -> None:
    hungry = nsjail_py.run_python("x = bytearray(200 << 20)", memory="400M")
    modest = nsjail_py.run_python("pass", memory="400M")
    assert hungry.peak_memory > 200 << 20
    assert modest.peak_memory < 100 << 20


def test_where_the_kernel_keeps_no_peak_of_a_group_that_of_its_largest_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 before Linux 5.19. Here the launcher looks for a file that is not there."""
    code = launcher.PROGRAM.read_bytes()
    for name in (b"memory.peak\0", b"memory.max_usage_in_bytes\0"):
        assert name in code
        code = code.replace(name, name.upper())
    (tmp_path / "launcher").write_bytes(code)
    (tmp_path / "launcher").chmod(0o755)
    monkeypatch.setattr(launcher, "PROGRAM", tmp_path / "launcher")
    launcher.shutdown()
    try:
        result = nsjail_py.run_python("x = bytearray(100 << 20)", memory="400M")
        assert result.memory_source == "rusage"
        assert 100 << 20 < result.peak_memory < 400 << 20
        found = nsjail_py.run_python("x = bytearray(100 << 20)", memory="50M")
        assert (found.verdict, found.evidence.get("limit", 0)) in (("memory", 50 << 20), ("exit", 0))  # without a group Python says so
        assert found.memory_source == "rusage"
    finally:
        launcher.shutdown()


AROUND = {
    "memory": ("memory.limit_in_bytes memory.max", 60 << 20, "x = bytearray(300 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1"),
    "processes": ("pids.max", 6, "import os, time\nfor n in range(20):\n  if not os.fork(): time.sleep(60)"),
}
LIMITED = """
import sys, nsjail_py
from pathlib import Path
from nsjail_py import launcher, why
files, limit, source = sys.argv[1].split(), sys.argv[2], sys.argv[3]
nsjail_py.run(["/bin/true"]).check()
for group in launcher.current().claim.directories.values():
    for name in files:
        if (group / name).exists():
            (group / name).write_text(limit)
for inner in ({"processes": 40}, {sys.argv[4]: None}, {"memory": "30M", "processes": 4}):
    found = nsjail_py.Jail("moderate", **inner).run_python(source)
    print(found.verdict, found.signal, found.evidence.get("outside"), found.oom_events, *[one.what for one in why.why(found)], sep=",")
"""


@pytest.mark.parametrize("what", AROUND)
def test_what_runs_out_around_the_jail_is_no_limit_of_the_policy(what: str) -> None:
    """A service's own limit, or a whole host without memory: the kernel counts the kill, or the refused fork, at the jail's group as well."""
    files, limit, source = AROUND[what]
    if launcher.current().claim.kind == "none":
        return  # then each process has its own limits, and nothing is around them
    told = subprocess.run(
        [sys.executable, "-c", LIMITED, files, str(limit), source, what], cwd=ROOT, capture_output=True, text=True, check=False
    )
    generous, unlimited, strict = (line.split(",") for line in told.stdout.splitlines())
    assert generous[0] == unlimited[0] == {"memory": "signal", "processes": "exit"}[what], told
    # From Linux 6.11 on a refused fork is counted where the limit is, and nothing is left to be told here.
    untold = what == "processes" and launcher.current().claim.kind == "v2" and KERNEL >= (6, 11)
    assert generous[2:] == unlimited[2:] == (["None", "0"] if untold else [what, "0", f"{what} around the jail"]), told
    assert strict[0] == what and strict[2] == "None", told


def test_a_run_has_no_more_swap_than_memory() -> None:
    """Version 1 limits both together, version 2 swap alone."""
    claim = launcher.current().claim
    files = {"memory.limit_in_bytes": 64 << 20, "memory.memsw.limit_in_bytes": 64 << 20, "memory.max": 64 << 20, "memory.swap.max": 0}
    with nsjail_py.Jail("moderate", memory="64M").start(["/bin/sleep", "60"]) as process:
        assert process.pid
        cells = [path for top in claim.directories.values() for path in top.glob("cell-*") if (path / "cgroup.procs").read_text()]
        told = {name: int((path / name).read_text()) for path in cells for name in files if (path / name).exists()}
    assert told.keys() >= {"v1": {"memory.limit_in_bytes"}, "v2": {"memory.max"}, "none": set[str]()}[claim.kind]
    assert claim.swap == any("sw" in name for name in told)
    assert told == {name: files[name] for name in told}


def test_a_group_that_cannot_be_removed_does_not_keep_the_launcher_awake() -> None:
    """Somebody has made one below it, say. It is removed when that is gone."""
    with nsjail_py.Jail("moderate", stock=0).start(["/bin/sleep", "60"]) as process:
        assert process.pid
        busy = [
            path
            for top in launcher.current().claim.directories.values()
            for path in top.glob("cell-*")
            if (path / "cgroup.procs").read_text()
        ]
        for path in busy:
            (path / "other").mkdir()
    status = Path(f"/proc/{launcher.current().pid}/status")
    time.sleep(0.5)
    woken = int(status.read_text().rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
    time.sleep(0.5)
    assert int(status.read_text().rpartition("\nvoluntary_ctxt_switches:")[2].split()[0]) - woken < 20
    for path in busy:
        (path / "other").rmdir()
    deadline = time.monotonic() + 20 * PATIENCE
    while any(map(Path.exists, busy)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(Path.exists, busy))


def test_the_group_of_a_run_is_the_root_of_what_it_sees() -> None:
    seen = nsjail_py.run_python("print(open('/proc/self/cgroup').read(), end='')", proc="masked").check().stdout.decode()
    ours = [group for group in cgroups.memberships(seen) if not group.controllers or {"memory", "pids"} & set(group.controllers)]
    assert launcher.current().claim.kind == "none" or all(group.path == "/" for group in ours)


AGAIN: dict[str, Callable[[], nsjail_py.Result]] = {
    "program": lambda: nsjail_py.run(["/bin/true"]),
    "asyncio": lambda: asyncio.run(nsjail_py.aio.run(["/bin/true"])),
    "warm": lambda: nsjail_py.Jail("untrusted", preload=[]).run_python("pass"),
}


def tidied_up(claim: cgroups.Claim) -> None:
    """Once what an earlier test has left is gone, too."""
    deadline = time.monotonic() + 20 * PATIENCE
    while any(map(Path.exists, claim.directories.values())) and time.monotonic() < deadline:
        cgroups.release(claim)
    assert not any(map(Path.exists, claim.directories.values()))


@pytest.mark.parametrize("way", AGAIN)
def test_a_launcher_whose_groups_somebody_has_removed_costs_no_run(way: str) -> None:
    """They are empty between two runs, and whoever tidies up may take them for left behind."""
    nsjail_py.run(["/bin/true"]).check()
    tidied_up(launcher.current().claim)
    AGAIN[way]().check()


def test_a_handle_of_such_a_launcher_is_an_error_and_the_next_one_works() -> None:
    nsjail_py.run(["/bin/true"]).check()
    claim, jail = launcher.current().claim, nsjail_py.Jail("untrusted")
    tidied_up(claim)
    with jail.start(["/bin/true"]) as process:
        if claim.kind != "none":
            with pytest.raises(nsjail_py.SetupError, match="cgroup"):
                process.wait()
    assert jail.start(["/bin/true"]).wait().ok


# ---------------------------------------------------------------- what is not ours


def test_only_what_a_dead_process_of_ours_left_is_stale(tmp_path: Path) -> None:
    me, mine = os.getpid(), cgroups._start(os.getpid())
    stale = [directory(tmp_path, DEAD, "1"), directory(tmp_path, me, f"{mine}9")]
    kept = [directory(tmp_path, me, mine), directory(tmp_path, DEAD, "1", namespace=1)]
    for name in ("docker", "nsjail_py", "nsjail_py.x", f"nsjail_py.{DEAD}", f"nsjail_py.{DEAD}.1.2.3.4", f"other.{DEAD}.1.2.3"):
        kept.append(tmp_path / name)
        kept[-1].mkdir()
    cgroups._remove_stale(tmp_path)
    assert not [path for path in stale if path.exists()]
    assert all(path.is_dir() for path in kept)


ORPHANS = """
import time, nsjail_py
from nsjail_py import launcher
process = nsjail_py.Jail("untrusted").start(["/bin/sleep", "600"])
print(launcher.current().pid, process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.elsewhere(launcher.current().claim.kind != "v2", why="only version 2 of control groups ends all that is in one")
def test_what_a_stopped_launcher_of_a_dead_caller_has_left_running_is_ended_by_the_next_one() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout
        stopped, program = map(int, caller.stdout.readline().split())
        os.kill(stopped, signal.SIGSTOP)
        try:
            caller.kill()
            caller.wait()
            time.sleep(0.2)
            assert Path(f"/proc/{program}").exists(), "nobody has told it"
            cgroups.release(cgroups.claim())
            deadline = time.monotonic() + 5 * PATIENCE
            while Path(f"/proc/{program}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not Path(f"/proc/{program}").exists()
        finally:
            os.kill(stopped, signal.SIGKILL)


@pytest.mark.skipif(not IS_ROOT, reason="only root can shift clocks")
def test_a_claim_under_shifted_clocks_takes_nobodys_group() -> None:
    """There /proc shows another time of start for every process, as if each number had been given away anew."""
    claim = cgroups.claim()
    try:
        code = "from nsjail_py import cgroups; cgroups.release(cgroups.claim())"
        shifted = ["unshare", "--time", "--fork", "--boottime", "864000", sys.executable, "-c", code]
        subprocess.run(shifted, cwd=ROOT, check=True)
        assert all(path.is_dir() for path in claim.directories.values())
    finally:
        cgroups.release(claim)


def test_a_stale_directory_with_anything_but_cells_in_it_stays(tmp_path: Path) -> None:
    stale = directory(tmp_path, DEAD, "1")
    (stale / "cell-1").mkdir()
    (stale / "stranger").mkdir()
    cgroups._remove_stale(tmp_path)
    assert (stale / "stranger").is_dir()


def test_a_group_with_strangers_in_it_is_not_taken_for_delegated(tmp_path: Path) -> None:
    for name, text in {"cgroup.procs": "1\n2\n", "cgroup.subtree_control": ""}.items():
        (tmp_path / name).write_text(text)
    assert not cgroups._lineage_only(tmp_path)
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n{os.getppid()}\n")
    assert cgroups._lineage_only(tmp_path)
    assert cgroups._delegated(tmp_path, root=True) is None, "to root everything is writable: only systemd's mark counts"
    assert cgroups._delegated(tmp_path, root=False) == tmp_path


def test_a_daemon_beside_us_is_a_stranger_although_we_have_one_ancestor(tmp_path: Path) -> None:
    daemon = subprocess.run(
        ["sh", "-c", "exec setsid sleep 60 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        # In a unit our parent is the manager that takes in orphans, too; it is in no group of ours.
        others = {os.getppid()} - {cgroups._parent(int(daemon))}
        (tmp_path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in (os.getpid(), *others, int(daemon))))
        assert not cgroups._lineage_only(tmp_path)
    finally:
        os.kill(int(daemon), signal.SIGKILL)


def test_a_unit_of_a_users_manager_is_the_managers_unless_it_says_otherwise(tmp_path: Path) -> None:
    manager = tmp_path / "user@1000.service"
    for name in ("app.slice/x.service", "app.slice/x.service/mine"):
        (manager / name).mkdir(parents=True, exist_ok=True)
        (manager / name / "cgroup.procs").write_text(f"{os.getpid()}\n")
        (manager / name / "cgroup.subtree_control").write_text("")
    assert cgroups._delegated(manager / "app.slice/x.service", root=False) is None
    assert cgroups._delegated(manager / "app.slice/x.service/mine", root=False) == manager / "app.slice/x.service/mine"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A group like that of a unit, in a slice, and one below it that we are in."""
    for group, processes in {"system.slice": "", "system.slice/x.service": "", "system.slice/x.service/mine": f"{os.getpid()}\n"}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "cgroup.procs").write_text(processes)
        (tmp_path / group / "cgroup.subtree_control").write_text("")
    return tmp_path / "system.slice/x.service"


def marked(*groups: Path) -> Callable[[Path, str], bytes]:
    return lambda path, name: b"1" if path in groups and name == "trusted.delegate" else b""


@pytest.mark.parametrize("root", [True, False])
def test_a_group_below_the_one_that_was_delegated_is_not_what_we_take(root: bool, unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DelegateSubgroup=: the limits and the controllers are those of the unit."""
    monkeypatch.setattr(cgroups, "_attribute", marked(unit))
    assert cgroups._delegated(unit / "mine", root) == unit
    (unit / "cgroup.procs").write_text("1\n")
    assert cgroups._delegated(unit / "mine", root) == (None if root else unit / "mine"), "a stranger is there, who is not to be moved"


@pytest.mark.parametrize("root", [True, False])
def test_what_lies_around_our_unit_is_not_ours_although_it_was_delegated(root: bool, unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's whole hierarchy is, to the systemd in it."""
    monkeypatch.setattr(cgroups, "_attribute", marked(unit.parent, unit.parent.parent))
    assert cgroups._delegated(unit / "mine", root) == (None if root else unit / "mine")


def test_a_group_that_was_delegated_to_a_users_manager_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = tmp_path / "user@1000.service"
    for group in (manager / "mine", manager):
        group.mkdir(parents=True, exist_ok=True)
        (group / "cgroup.procs").write_text("")
        (group / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(cgroups, "_attribute", marked(manager))
    assert cgroups._delegated(manager / "mine", root=False) == manager / "mine"
    assert cgroups._delegated(manager / "mine", root=True) is None


def test_a_group_below_a_users_unit_that_was_handed_over_is_not_what_we_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed = tmp_path / "user@1000.service/app.slice/x.service"
    (handed / "mine").mkdir(parents=True)
    for group in (handed, handed / "mine"):
        (group / "cgroup.procs").write_text("")
        (group / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(cgroups, "_handed_over", lambda unit: unit == handed)
    assert cgroups._delegated(handed / "mine", root=False) == handed


def test_a_missing_controller_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset pids hugetlb\n")
    with pytest.raises(cgroups._NoneError) as raised:
        cgroups._hand_on(tmp_path)
    why, remedy = raised.value.args
    assert "no memory controller" in why
    assert "Delegate=" in remedy


def test_controllers_that_are_there_are_handed_on(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("pids\n")
    cgroups._hand_on(tmp_path)
    # A file of the kernel's takes them all; this one shows the last.
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpuset"
