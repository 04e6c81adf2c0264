"""What makes no sense is one clear, typed error, and leaves nothing. (The command line's half is in test_cli.py.)"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from msgspec.structs import replace

import nsjail_py
from nsjail_py import Jail, Mount, PolicyError, SetupError, Verdict

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "64MB"},
        {"memory": -1},
        {"cpu_time": float("nan")},
        {"cpu_time": "1 parsec"},
        {"processes": 0},
        {"memry": 1},
        {"root": "relative"},
    ],
    ids=str,
)
def test_a_limit_that_makes_no_sense_is_never_no_limit(changes: dict[str, object]) -> None:
    with pytest.raises(PolicyError) as caught:
        Jail("untrusted", **changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_policy_is_named_with_what_was_meant() -> None:
    with pytest.raises(PolicyError, match="untrusted"):
        Jail("untrused")


def test_a_mount_whose_source_is_missing_is_named() -> None:
    with pytest.raises(PolicyError, match="/nonexistent"):
        nsjail_py.run(["/bin/true"], mounts=[Mount(source="/nonexistent", target="/data")])


def test_a_target_below_a_read_only_mount_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    mounts = [Mount(source=str(tmp_path), target="/usr/share/not-there")]
    with pytest.raises(SetupError) as caught:
        nsjail_py.run(["/bin/true"], policy="moderate", root="system", mounts=mounts)
    assert caught.value.step == "mount bind" and "/usr/share/not-there" in str(caught.value)
    assert nsjail_py.run(["/bin/true"], policy="moderate", mounts=mounts).ok  # a minimal root is made with a place for it


def test_a_nul_in_an_argument_or_variable_is_refused() -> None:
    with pytest.raises(PolicyError, match="NUL"):
        nsjail_py.run(["/bin/echo", "a\0b"])
    with pytest.raises(PolicyError, match="NUL"):
        nsjail_py.run(["/bin/true"], env={"A": "a\0b"})


def test_an_argument_list_beyond_the_kernels_limit_is_exec_failed() -> None:
    result = nsjail_py.run(["/bin/true", "x" * 200_000])
    assert result.verdict is Verdict.exec_failed and result.evidence["error"] == "Argument list too long"


def test_a_program_for_another_machine_is_exec_failed(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"not a program\n")
    path.chmod(0o755)
    result = nsjail_py.run([str(path)])
    assert result.verdict is Verdict.exec_failed and result.evidence["error"] == "Exec format error"


def test_what_is_no_program_raises_what_subprocess_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nsjail_py.run(["/nonexistent"])
    with pytest.raises(PermissionError):
        nsjail_py.run([str(tmp_path)])
    with pytest.raises(PolicyError):
        nsjail_py.run([])


def test_a_malformed_program_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"\x7fELF\x02\x01" + b"\xff" * 200)
    path.chmod(0o755)
    with pytest.raises(PolicyError, match="ELF"):
        nsjail_py.run([str(path)])


def test_a_required_protection_that_the_host_lacks_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsjail_py import compiled

    strict = replace(nsjail_py.policy("untrusted"), best_effort=())
    monkeypatch.setattr(compiled.landlock, "SCOPE_ABI", 10_000)
    with pytest.raises(nsjail_py.Unavailable, match="landlock_scope"):
        nsjail_py.run(["/bin/true"], policy=replace(strict, hostname="other"))


def test_a_script_larger_than_the_disk_is_a_set_up_error() -> None:
    with pytest.raises(SetupError, match="disk limit"):
        nsjail_py.run_python("#" * 3_000_000, disk="1M")


def test_no_more_descriptors_is_an_error_and_the_next_run_works() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.dup(0))
        for descriptor in held[-3:]:
            os.close(descriptor)
        del held[-3:]
        with pytest.raises(OSError):
            nsjail_py.run(["/bin/true"])
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert nsjail_py.run(["/bin/true"]).ok


def test_a_plan_that_is_not_sealed_or_not_sound_is_refused() -> None:
    """The launcher's own check, reached past Python's."""
    import socket

    from nsjail_py import launcher, plan, reports

    good = Jail("untrusted")
    for data in (b"", b"x" * 4096, plan.compile_order("/x", ["x"], {})):
        null = os.open(os.devnull, os.O_RDWR)
        block = plan.sealed("plan", data)
        channel: socket.socket = launcher.current().submit(block, block, [null, null, null], started=False)
        report = reports.parse(channel.recv(1 << 16))
        assert reports.STEP_NAMES[report.step] == "plan"
        channel.close()
        os.close(block)
        os.close(null)
    assert good.run(["/bin/true"]).ok
