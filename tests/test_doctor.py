"""The doctor tells the truth about this host: its word agrees with a real jail's, and each lack comes with what to do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import ROOT
from ordinary import python_for_all

import nsjail_py
from nsjail_py import cgroups, doctor, hostinfo, mountinfo, scope, userns
from nsjail_py._native import lib


@pytest.fixture(scope="module")
def found() -> doctor.Report:
    return doctor.report()


def test_the_exit_status_says_whether_the_default_policy_can_be_applied_in_full(cli: list[str]) -> None:
    done = subprocess.run([*cli, "doctor"], capture_output=True, text=True, check=False)
    result = nsjail_py.run(["/bin/true"])
    full = not [protection for protection in result.protections if protection.state == "unavailable"]
    assert done.returncode == (0 if full else 1), done.stdout + done.stderr
    assert ("can be applied in full" in done.stdout) == full


def test_the_json_is_whole_and_is_all_there_is_on_standard_output(cli: list[str]) -> None:
    done = subprocess.run([*cli, "doctor", "--json"], capture_output=True, text=True, check=False)
    record = json.loads(done.stdout)
    assert record["full"] == (done.returncode == 0)
    assert record["host"]["kernel"] == list(hostinfo.probe().kernel)
    assert set(record["host"]["calls"]) == set(hostinfo.CALLS)
    assert {finding["state"] for finding in record["findings"]} <= {"ok", "lack", "note"}


def test_every_lack_has_a_remedy(found: doctor.Report) -> None:
    assert not [finding for finding in found.findings if finding.state == "lack" and not finding.remedy]


def test_a_jail_runs_in_the_mode_that_the_doctor_names(found: doctor.Report) -> None:
    assert nsjail_py.run(["/bin/true"]).mode == found.mode
    assert [mode.mode for mode in found.modes if mode.here] == [found.mode]
    assert [mode.mode for mode in found.modes] == ["root", "delegated", "rootless"]


def test_what_a_real_jail_missed_is_listed_with_the_reason(found: doctor.Report) -> None:
    lacking = {p.name: p.reason for p in nsjail_py.run(["/bin/true"]).protections if p.state == "unavailable"}
    assert found.missing == lacking
    assert all(lacking.values())


def test_the_report_for_people_has_every_finding_and_fits_a_screen(found: doctor.Report) -> None:
    lines = doctor.text(found).splitlines()
    assert {finding.name for finding in found.findings} <= {line[8:].split("  ")[0].strip() for line in lines}
    assert not [line for line in lines if len(line) > doctor.WIDTH and " " in line[24:].strip()]


def test_the_report_leaves_nothing(leaves_nothing: None) -> None:
    doctor.report()


# ---------------------------------------------------------------- hosts that lack something


def lacking(**changes: object) -> hostinfo.Host:
    return msgspec.structs.replace(hostinfo.probe(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("look", "part"),
    [
        (lambda: doctor._landlock(lacking(landlock_abi=0)), "lsm="),
        (lambda: doctor._seccomp(lacking(seccomp_actions=("allow",))), "CONFIG_SECCOMP_FILTER"),
        (lambda: doctor._kernel(lacking(calls=(("mount_setattr", errno.ENOSYS),), filtered=False)), "Linux 5.12"),
        (lambda: doctor._memory(lacking(swap=2**30), cgroups.Claim("v1", "root")), "swapaccount=1"),
        (lambda: doctor._memory(lacking(swap=-errno.EPERM), cgroups.Claim("none", "rootless")), "see control groups"),
        (lambda: doctor._control_groups(cgroups.Claim("none", "rootless", why="not ours", remedy=cgroups.DELEGATE)), "Delegate=yes"),
    ],
    ids=["Landlock", "seccomp", "an old kernel", "swap", "swap that is not told", "control groups"],
)
def test_a_host_that_lacks_it_is_told_how_to_get_it(look: Callable[[], list[doctor.Finding]], part: str) -> None:
    lacks = [finding for finding in look() if finding.state == "lack"]
    assert lacks
    assert part in lacks[0].remedy


def test_an_old_landlock_is_a_note_and_no_lack() -> None:
    states = {finding.state for finding in doctor._landlock(lacking(landlock_abi=2))}
    assert states == {"ok", "note"}


def test_a_jail_that_cannot_be_made_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*_args: object, **_changes: object) -> None:
        raise nsjail_py.SetupError("user namespace", errno.EPERM, advice="ask the administrator")

    monkeypatch.setattr(nsjail_py, "run", refused)
    assert doctor.main() == 1
    told = capsys.readouterr().out
    assert "ask the administrator" in told
    assert "can NOT be applied in full" in told


# ---------------------------------------------------------------- who is to blame


def test_refused_user_namespaces_are_the_finding_and_not_their_consequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "refusal", lambda host: hostinfo.Lack("user namespace", "refused", "ask root"))
    assert doctor._namespaces(hostinfo.probe(), False) == [doctor.Finding("user namespace", "lack", "refused", "ask root")]


def test_the_covers_of_proc_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Covered:
        PROBE_KILLED = lib.PROBE_KILLED

        @staticmethod
        def probe_proc(pids_only: int) -> int:
            return errno.EPERM

    monkeypatch.setattr(doctor, "lib", Covered)
    monkeypatch.setattr(mountinfo, "entries", lambda: [mountinfo.Entry("/", "/proc/kcore", frozenset(), "tmpfs", frozenset())])
    (lack,) = doctor._proc()
    assert lack.text == "a fresh /proc cannot be mounted: Operation not permitted; covered here: /proc/kcore"
    assert "systempaths=unconfined" in lack.remedy


def test_a_covered_proc_is_found_by_trying() -> None:
    """What a container does to /proc, done for real in namespaces of our own; not by mount(8), which SELinux may hold to a domain."""
    mount = "import ctypes; assert ctypes.CDLL(None).mount(b'/dev/null', b'/proc/uptime', None, 4096, None) == 0"
    code = f"{mount}; from nsjail_py._native import lib; print(lib.probe_proc(0))"
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(errno.EPERM), done.stderr
    assert lib.probe_proc(0) == 0


def test_a_chroot_is_named_as_the_one_who_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not userns.chrooted()
    monkeypatch.setattr(mountinfo, "entries", lambda: [mountinfo.Entry("/", "/proc", frozenset(), "proc", frozenset())])
    assert userns.chrooted()
    lack = userns._blame("user namespace", errno.EPERM, hostinfo.probe())
    assert "chroot" in lack.reason
    assert "pivot_root" in lack.remedy


def test_in_a_jail_no_remedy_is_one_that_cannot_work_there() -> None:
    """Its limit of user namespaces belongs to its own, and neither the program inside nor root outside may raise it by sysctl."""
    code = "from nsjail_py import hostinfo, userns; print(userns.refusal(hostinfo.probe()))"
    packages = str(Path(msgspec.__file__).parent.parent)
    shown = [nsjail_py.Mount(source=source, target=to) for source, to in ((str(ROOT), "/mnt"), (packages, "/media"))]
    run = nsjail_py.run([python_for_all(), "-c", code], policy="trusted", mounts=shown, env={"PYTHONPATH": "/mnt:/media"})
    said = run.check().stdout
    assert b"user.max_user_namespaces is 0" in said
    assert b"sysctl" not in said and b"make jails beside" in said


@pytest.mark.parametrize(("runs", "remedy"), [(True, "enable-linger"), (False, "have root make a group")])
def test_whoever_has_no_manager_to_ask_is_not_told_to_ask_it(
    runs: bool, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd-run --user goes to the same manager, over the same bus."""
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    monkeypatch.setattr(hostinfo, "systemd_lack", lambda: "" if runs else "systemd does not run this machine")
    with pytest.raises(cgroups._NoneError) as raised:
        cgroups._scope(tmp_path, [], os.getpid())
    told = ": ".join(raised.value.args)
    assert remedy in told and "systemd-run" not in told
    assert ("systemd does not run" in told) != runs


def test_an_answer_that_does_not_come_is_told_in_a_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope, "SECONDS", 0.05)
    assert scope._answer(["/bin/sleep", "60"], {}) == (1, "no answer within 0 s")


def test_an_answer_that_is_not_utf_8_is_one() -> None:
    assert scope._answer(["/usr/bin/printf", r"na\357ve"], {}) == (0, "na\N{REPLACEMENT CHARACTER}ve")
