"""The self-test tells the truth: every attack works where nothing stops it, a promise that is broken is told, and nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import IS_ROOT, PATIENCE, ROOT

import nsjail_py
from nsjail_py import Policy, doctor, policyfile, selftest, selftest_promises
from nsjail_py.selftest_canaries import VARIABLE, Canaries

PROBE = ROOT / "nsjail_py" / "selftest_probe.py"
ALL = [promise.attack for promise in selftest_promises.promises("/nowhere", VARIABLE)]
AREAS = {
    *(
        "environment",
        "files",
        "mounts",
        "processes",
        "network",
        "shared objects",
        "privileges",
        "system calls",
        "limits",
        "clean-up",
        "namespaces",
    ),
}

FILTER_ALONE = {
    *selftest_promises.FAMILIES,
    *("unknown-call", "set-user-id-file", "new-process", "new-program", "odd-sockets", "terminal-input", "dangerous-prctl"),
    *("unreadable-flags", "x32", "i386", "core-helper"),
}
"""What no other layer of `untrusted` keeps."""
NETWORK = {"tcp-to-host", "udp-to-host", "route", "abstract-socket"}
OBJECTS = {"shared-memory", "semaphores", "message-queue", "posix-queue"}


def states(report: selftest.Report) -> dict[str, str]:
    return {check.name: check.state for check in report.checks}


def held(report: selftest.Report) -> set[str]:
    return {check.name for check in report.checks if check.state == "held"}


def layers(report: selftest.Report) -> dict[str, str]:
    return {check.name: check.layer for check in report.checks}


def unknown(report: selftest.Report) -> set[str]:
    return {check.name for check in report.checks if check.state == "unavailable"}


@pytest.fixture(scope="module")
def untrusted() -> selftest.Report:
    return selftest.report("untrusted")


@pytest.fixture(scope="module")
def moderate() -> selftest.Report:
    return selftest.report("moderate")


def changed(policy: str, **fields: object) -> Policy:
    return msgspec.structs.replace(policyfile.load(policy), **fields)


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in policyfile.load("moderate").namespaces if name not in names)


# ---------------------------------------------------------------- the command


def test_the_command_shows_every_promise_with_what_held_it(cli: list[str]) -> None:
    done = subprocess.run([*cli, "selftest"], capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert set(lines) >= AREAS
    assert len([line for line in lines if line.startswith("  ")]) == len(ALL)
    assert len([line for line in lines if re.match(r"  held +\S.*  +\S", line)]) >= 75
    assert float(re.search(r"in ([\d.]+) s$", lines[-1])[1]) < 20


def test_the_json_has_the_same(cli: list[str]) -> None:
    done = subprocess.run(
        [*cli, "selftest", "--policy", "trusted", "--json"], capture_output=True, text=True, timeout=60 * PATIENCE, check=False
    )
    record = json.loads(done.stdout)
    assert (record["ok"], record["policy"], done.returncode) == (True, "trusted", 0), done.stdout
    assert [check["name"] for check in record["checks"]] == ALL
    assert all(check["layer"] for check in record["checks"] if check["state"] == "held")
    assert all(check["detail"] for check in record["checks"] if check["state"] in ("unavailable", "FAILED", "not promised"))


def test_a_policy_that_does_not_exist_is_one_line_and_125(cli: list[str]) -> None:
    done = subprocess.run([*cli, "selftest", "--policy", "untrused"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, "", 1)


def test_other_commands_do_not_pay_for_it() -> None:
    code = "import sys, nsjail_py.cli as c; c.parser(); print([m for m in sys.modules if 'selftest' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_doctor_points_to_it() -> None:
    assert "nsjail-py selftest" in doctor.text(doctor.report())


# ---------------------------------------------------------------- shipped policies


def test_at_least_forty_promises_hold_under_the_default_policy(untrusted: selftest.Report) -> None:
    assert untrusted.ok and len(held(untrusted)) >= 75
    promised = set(ALL) - {"denied-ends", "too-large-a-file", "idle-time"}
    missing = {p.name for p in nsjail_py.run(["/bin/true"]).protections if p.state == "unavailable"}
    assert promised - held(untrusted) == unknown(untrusted)
    if not missing:
        assert unknown(untrusted) <= {"user-keyring", "session-keyring", "posix-queue", "route", "i386"}, "only what this host itself lacks"


def test_what_the_host_cannot_give_is_unavailable_and_never_held(untrusted: selftest.Report) -> None:
    missing = {p.name: p.reason for p in nsjail_py.run(["/bin/true"]).protections if p.state == "unavailable"}
    found = {check.name: check for check in untrusted.checks}
    for protection, name in {"own_uid": "own-uid", "groups": "groups", "cgroup": "memory-together"}.items():
        assert (found[name].state == "unavailable") == (protection in missing)
        assert protection not in missing or found[name].detail == missing[protection]


def test_a_layer_that_the_host_lacks_is_not_what_held() -> None:
    wall, second = selftest_promises.Layer("first", protection="own_uid"), selftest_promises.Layer("second")
    result = nsjail_py.run(["/bin/true"])
    promise = selftest_promises.Promise("x", "files", "nothing", (wall, second))
    refused, got = selftest.Outcome(False, "EPERM"), selftest.Outcome(True, "")
    policy = policyfile.load("untrusted")
    assert selftest._judge(promise, policy, refused, result, {})[3:6] == ("held", "first", ("second",))
    assert selftest._judge(promise, policy, refused, result, {"own_uid": "no root"})[3:6] == ("held", "second", ())
    assert selftest._judge(promise._replace(layers=(wall,)), policy, refused, result, {"own_uid": "no root"}).state == "unavailable"
    assert selftest._judge(promise, policy, got, result, {}).state == "FAILED"
    assert selftest._judge(promise, policy, None, result, {}).state == "FAILED", "an attack that gave no answer proves nothing"


# ---------------------------------------------------------------- layers taken away


def test_without_the_filter_just_what_it_keeps_alone_is_lost(untrusted: selftest.Report) -> None:
    report = selftest.report(changed("untrusted", syscalls=None))
    assert report.ok and held(untrusted) - held(report) == FILTER_ALONE - unknown(untrusted)
    lost = {check.name: check for check in report.checks if check.name in FILTER_ALONE}
    assert {check.state for check in lost.values()} == {"not promised"}
    assert [name for name, check in lost.items() if "the attack succeeds" not in check.detail] == []
    assert "system call filter" not in layers(report).values(), "what still holds is held by other layers"
    assert layers(report)["mount"] == "no capabilities" and layers(report)["shared-memory"] == "IPC namespace"


def test_without_namespaces_and_a_root_of_its_own_just_what_they_keep_is_lost(moderate: selftest.Report) -> None:
    report = selftest.report(
        changed("moderate", namespaces=without("net", "ipc", "uts", "cgroup"), loopback=False, root="host", landlock=False)
    )
    lost = NETWORK | OBJECTS | {"left-memory", "host-name", "control-group-path", "host-file", "path-socket"}
    if not IS_ROOT:
        lost |= {"host-secret"}  # its user id is the caller's
    assert report.ok and held(moderate) - held(report) == lost - unknown(moderate)
    told = {check.name: check for check in report.checks}
    for name in lost - unknown(moderate) - ({"control-group-path"} if own_group_is_the_root() else set()):
        assert told[name].state in ("not promised", "unavailable") and (
            "the attack succeeds" in told[name].detail or name == "host-secret"
        ), told[name]


def own_group_is_the_root() -> bool:
    return {line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()} == {"/"}


def test_landlock_alone_keeps_tcp_and_abstract_sockets_away(moderate: selftest.Report) -> None:
    """The network is the host's and the filter allows sockets: what is left is Landlock, which knows nothing about UDP."""
    report = selftest.report(changed("moderate", namespaces=without("net"), loopback=False, landlock=True))
    available = {p.name for p in nsjail_py.run(["/bin/true"], policy="moderate", landlock=True).protections if p.state == "applied"}
    assert report.ok
    assert (states(report)["udp-to-host"], states(report)["tcp-to-host"]) == (
        "not promised",
        "held" if "landlock_net" in available else "unavailable",
    )
    assert layers(report)["abstract-socket"] == ("Landlock" if "landlock_scope" in available else "")


def test_what_a_policy_gives_away_is_told_as_not_promised(untrusted: selftest.Report, tmp_path: Path) -> None:
    given = policyfile.load("untrusted").syscalls
    assert given is not None
    report = selftest.report(
        changed(
            "untrusted",
            env_pass=(VARIABLE,),
            exec_in_writable=True,
            workdir=str(tmp_path),
            syscalls=msgspec.structs.replace(given, allow=(*given.allow, "@processes", "seccomp", "keyctl"), exec=True, on_denied="kill"),
            limits=nsjail_py.Limits(
                **dict.fromkeys(("cpu_time", "memory", "processes", "open_files", "disk", "files", "output")),
                file_size=1 << 20,
                idle_time=30.0,
            ),
        )
    )
    lost = {"environment", "execute-written", "left-files", "new-process", "new-program", "calls-own-filter"}
    lost |= {
        "too-many-files-open",
        "too-much-disk",
        "too-many-files",
        "too-many-threads",
        "memory",
        "memory-together",
        "cpu-time",
        "output",
    }
    assert report.ok and held(untrusted) - held(report) == lost - unknown(untrusted)
    assert held(report) - held(untrusted) == {"denied-ends", "too-large-a-file", "idle-time"}
    told = {check.name: check for check in report.checks}
    assert [name for name in lost if "the attack succeeds" not in told[name].detail] == []
    assert layers(report)["session-keyring"] == "session keyring of its own" and layers(report)["calls-keyrings"] == "system call filter"
    assert list(tmp_path.iterdir()) == [], "what the attack left in a kept directory is removed"


# ---------------------------------------------------------------- every check can fail


def open_wide(_: Policy) -> Policy:
    """A jail that has given up whatever a policy can give up."""
    limits = dict.fromkeys(selftest.BOUNDS) | dict.fromkeys(("cpu_time", "memory", "idle_time", "output")) | {"wall_time": 20.0}
    return changed(
        "trusted", namespaces=("user", "mount", "pid"), env_pass=(VARIABLE,), limits=nsjail_py.Limits(**limits), best_effort=("own_uid", "groups", "cgroup", "swap", "landlock_net", "landlock_scope", "nested_userns")
    )  # fmt: skip


FAILS_IN_AN_OPEN_JAIL = {
    *FILTER_ALONE,
    *NETWORK,
    *OBJECTS,
    *("left-memory", "host-name", "control-group-path", "host-file", "path-socket", "environment", "execute-written", "output"),
    *("too-many-files-open", "too-large-a-file", "too-much-disk", "too-many-files", "too-many-threads", "memory", "memory-together"),
    *("cpu-time", "wall-time", "denied-ends", "idle-time"),
}


def test_a_jail_that_is_not_what_its_policy_says_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Judged by a strict policy, run under an open one: each promise that is broken is told, and the command fails."""
    given = policyfile.load("untrusted").syscalls
    assert given is not None
    strict = changed(
        "untrusted",
        syscalls=msgspec.structs.replace(given, on_denied="kill"),
        limits=msgspec.structs.replace(policyfile.load("untrusted").limits, file_size=1 << 20, idle_time=30.0),
    )
    monkeypatch.setattr(selftest, "_with_room", open_wide)
    monkeypatch.setattr(selftest, "override", lambda policy, **_: policy)
    monkeypatch.setattr(selftest, "resolve", lambda _: strict)
    monkeypatch.setattr(selftest, "_denied_ends", lambda _: pytest.fail("not called"))
    assert selftest.main("strict", json=True) == 1
    record = json.loads(capsys.readouterr().out)
    failed = {check["name"] for check in record["checks"] if check["state"] == "FAILED"}
    expected = FAILS_IN_AN_OPEN_JAIL - {check["name"] for check in record["checks"] if check["state"] == "unavailable"}
    if own_group_is_the_root():
        expected.discard("control-group-path")
    if not IS_ROOT:
        expected.add("host-secret")
    assert failed == expected and not record["ok"]


CAPABILITIES = (2, 6, 7, 13, 18, 19, 21, 27)
"""DAC_READ_SEARCH, SETGID, SETUID, NET_RAW, SYS_CHROOT, SYS_PTRACE, SYS_ADMIN, MKNOD."""
EFFECTIVE = int(re.search(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())[1], 16)
CAPABLE = IS_ROOT and all(EFFECTIVE >> number & 1 for number in CAPABILITIES)

JUDGED_BY_THE_HOST = {
    "unknown-call": "the launcher's count",
    "own-uid": "/proc of the host",
    **dict.fromkeys(selftest.TRIALS, "a run of its own"),
    **dict.fromkeys(("left-processes", "left-on-host", "dead-caller"), "what is there afterwards"),
}
"""Not an attack of the probe: broken on purpose elsewhere in this file."""


@pytest.fixture
def canaries() -> Iterator[Canaries]:
    with Canaries() as made:
        yield made
        made.clear_away()


def outside(canaries: Canaries, attacks: list[str], scratch: Path) -> dict[str, list[object]]:
    """The probe as a plain process of this host."""
    target = {**canaries.target, **selftest._target(policyfile.load("trusted"), attacks), "scratch": str(scratch)}
    target |= {"core_helper": "/any", "leave": [str(scratch)], "writable": []}
    done = subprocess.run(
        [sys.executable, str(PROBE)],
        input=json.dumps(target).encode() + b"\n",
        stdout=subprocess.PIPE,
        pass_fds=[canaries.inherited],
        extra_groups=[4242],
        timeout=60 * PATIENCE,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not CAPABLE, reason="only root can do what the attacks try")
def test_every_attack_succeeds_outside_of_a_jail(canaries: Canaries, tmp_path: Path) -> None:
    own_priority = os.getpriority(os.PRIO_PROCESS, 0)
    attacks = [name for name in ALL if name not in JUDGED_BY_THE_HOST and name not in canaries.lacks and not name.startswith("left-")]
    attacks.insert(attacks.index("new-uts-namespace"), "leave-something")
    outcome = outside(canaries, attacks, tmp_path)
    refused = {name: how for name, (got, how) in outcome.items() if not got}
    if own_group_is_the_root():
        refused.pop("control-group-path", None)
    assert set(outcome) == set(attacks) and refused == {}
    assert [how for _, how in outcome.values() if "the check itself failed" in str(how)] == []
    assert canaries.datagram_came() and canaries.process_changed() == "its priority is another"
    assert canaries.left_processes(), "what outlives its caller is found"
    later = outside(canaries, ["left-files", "left-memory"], tmp_path)
    assert later["left-files"][0] and later["left-memory"][0]
    canaries.clear_away()
    assert selftest._until(lambda: not canaries.left_processes())
    assert not outside(canaries, ["left-memory"], tmp_path)["left-memory"][0]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own_priority


def test_every_promise_was_seen_to_break() -> None:
    attacked = set(ALL) - set(JUDGED_BY_THE_HOST)  # by test_every_attack_succeeds_outside_of_a_jail
    broken_below = {"left-processes", "left-on-host", "dead-caller", "own-uid"}
    assert attacked | FAILS_IN_AN_OPEN_JAIL | broken_below == set(ALL)


def test_what_stays_on_the_host_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that nobody closed, a process, a caller whose run goes on: each is seen."""
    monkeypatch.setattr(selftest, "SECONDS_TO_CLEAR", 0.3)
    policy = policyfile.load("trusted")
    with Canaries() as made:
        before = selftest.traces()
        leak = os.open("/dev/null", os.O_RDONLY)
        name = made.marker[:15]
        code = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0); print(1, flush=True); time.sleep(30)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stays:
            assert stays.stdout is not None and stays.stdout.readline()
            monkeypatch.setattr(selftest, "CALLER", f"print({os.getpid()}, flush=True)")
            outcomes = selftest._left(policy, made, before)
            assert stays.wait() == -9, "and ended, since it bears our name"
        os.close(leak)
    assert outcomes["left-processes"] == (True, f"process {stays.pid}", "")
    assert outcomes["left-on-host"].got and "descriptors" in outcomes["left-on-host"].how
    assert outcomes["dead-caller"].got


def test_a_user_id_of_somebody_else_is_told() -> None:
    assert selftest._owner(os.getpid()) == os.geteuid() and selftest._owner(4_194_305) == -1


# ---------------------------------------------------------------- nothing stays behind


def test_the_canaries_are_gone_afterwards() -> None:
    with Canaries() as made:
        places = [made.folder, *map(Path, made.target["tmp_files"])]
        assert all(path.exists() for path in places)
    assert not any(path.exists() for path in places)
    assert VARIABLE not in os.environ and made.process.poll() is not None
    assert selftest._until(lambda: made.marker not in Path("/proc/keys").read_text()), "the kernel takes them away a little later"
    for kind in ("shm", "sem", "msg"):
        table = Path(f"/proc/sysvipc/{kind}")
        assert not table.exists() or str(made.key) not in table.read_text().split()
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("st-") and made.marker in name]


def test_the_self_test_leaves_nothing(leaves_nothing: None) -> None:
    assert selftest.report("untrusted").ok
