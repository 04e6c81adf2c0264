"""What makes no sense is one clear, typed error, and leaves nothing. (The command line's half is in test_cli.py.)"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, ROOT
from msgspec.structs import replace

import nsjail_py
from nsjail_py import (
    Jail,
    JailExecutor,
    Mount,
    PolicyError,
    SetupError,
    Syscalls,
    Verdict,
    aio,
    compiled,
    launcher,
    plan,
    reports,
    saved,
)
from nsjail_py._native import lib

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


UNTRUSTED = nsjail_py.policy("untrusted")
LIMITS: list[dict[str, Any]] = [{"disk": 0}, {"memory": "64MB"}, {"memory": -1}, {"cpu_time": float("nan")}, {"processes": 0}]
MADE_IN_PYTHON: list[dict[str, Any]] = [
    *({"limits": replace(UNTRUSTED.limits, **limit)} for limit in LIMITS),
    {"limits": None},
    {"root": "relative"},
    {"hostname": b"jail"},
    {"syscalls": replace(UNTRUSTED.syscalls or Syscalls(), on_denied="kil")},
    {"mounts": (Mount(source="/etc", target="/tmp/../etc"),)},
]


@pytest.mark.parametrize("way", ["Jail", "Jail with a change", "run", "executor", "save"])
@pytest.mark.parametrize("changes", MADE_IN_PYTHON, ids=lambda changes: str(changes)[:60])
def test_a_policy_that_was_made_in_python_is_checked_as_any_other(changes: dict[str, Any], way: str, tmp_path: Path) -> None:
    """msgspec checks no types there."""
    made = replace(UNTRUSTED, **changes)
    ways: dict[str, Callable[[], object]] = {
        "Jail": lambda: Jail(made),
        "Jail with a change": lambda: Jail(made, wall_time=1.0),
        "run": lambda: nsjail_py.run(["/bin/true"], policy=made),
        "executor": lambda: JailExecutor(made, 1),
        "save": lambda: saved.save(made, tmp_path / "plan"),
    }
    with pytest.raises(PolicyError) as caught:
        ways[way]()
    assert str(caught.value).startswith(f"$.{next(iter(changes))}") and "\n" not in str(caught.value)


def test_what_a_policy_file_may_say_may_be_said_in_python() -> None:
    made = replace(UNTRUSTED, limits=replace(UNTRUSTED.limits, memory="256M"), mounts=[Mount(source=Path("/etc"), target="/data")])  # type: ignore[arg-type]
    assert Jail(made).policy.limits.memory == 256 << 20
    mounts = [Mount(source=Path("/etc"), target=Path("/data"))]  # type: ignore[arg-type]
    for result in (nsjail_py.run_python("open('/data/passwd')", policy=made), nsjail_py.run_python("open('/data/passwd')", mounts=mounts)):
        result.check()


@pytest.mark.parametrize("lifetime", [-1, 0, float("nan"), float("inf"), 1e300, "10s"])
def test_a_lifetime_that_is_none_is_an_error(lifetime: Any) -> None:
    with Jail("untrusted") as jail, pytest.raises(PolicyError, match=re.escape(f"lifetime = {lifetime!r}: more than 0")):
        jail.session(lifetime)


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


@pytest.mark.parametrize("text", ["/bin/true", b"/bin/true", Path("/bin/true")])
def test_one_text_is_no_list_of_arguments(text: Any) -> None:
    with Jail("untrusted", preload=[]) as warm:
        calls: list[Callable[[], object]] = [
            lambda: nsjail_py.run(text),
            lambda: nsjail_py.run_python("pass", args=text),
            lambda: Jail().start(text),
            lambda: Jail().start_python("pass", args=text),
            lambda: warm.run_python("pass", args=text),
            lambda: asyncio.run(aio.run(text)),
            lambda: asyncio.run(aio.run_python("pass", args=text)),
        ]
        for call in calls:
            with pytest.raises(PolicyError, match="a list of arguments, not one text"):
                call()


def test_a_path_is_no_source_and_one_text_no_list_of_modules() -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("the text of a script, not its path", lambda: nsjail_py.run_python(Path("a.py"))),  # type: ignore[arg-type]
        ("the text of a script, not its path", lambda: asyncio.run(aio.run_python(Path("a.py")))),  # type: ignore[arg-type]
        ("preload = 'numpy': a list of modules", lambda: Jail(preload="numpy")),
        ("preload = 'numpy': a list of modules", lambda: JailExecutor(preload="numpy")),
    ]
    for said, call in calls:
        with pytest.raises(PolicyError, match=said):
            call()


def test_a_program_may_be_named_in_bytes_as_an_argument_may(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/\xff"
    os.symlink("/bin/echo", path)
    for program in (b"/bin/echo", b"echo", path):
        assert nsjail_py.run([program, b"a\xff"]).check().stdout == b"a\xff\n"


def test_a_program_whose_interpreter_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/nowhere\n")
    (tmp_path / "script").chmod(0o755)
    result = nsjail_py.run([tmp_path / "script"], policy="moderate", root="system")
    assert result.verdict is Verdict.exec_failed and result.evidence["program"] == "/app/script"
    assert result.summary.endswith("No such file or directory (/app/script, or the interpreter that it names)")


def test_an_argument_list_beyond_the_kernels_limit_is_exec_failed() -> None:
    for arguments in (["x" * 200_000], ["x" * 100_000] * 30, ["x"] * 500_000):  # one, all together, and their pointers
        results = nsjail_py.run(["/bin/true", *arguments]), nsjail_py.run_python("print(1)", args=arguments)
        assert [(r.verdict, r.evidence["error"]) for r in results] == [(Verdict.exec_failed, "Argument list too long")] * 2


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


@pytest.mark.skipif(not IS_ROOT, reason="only root can change the root directory")
def test_a_chroot_is_an_error_that_says_what_to_do_instead(tmp_path: Path) -> None:
    """The kernel lets nobody in a chroot make the mounts of a jail, and no user namespace either."""
    enter = """
mount --make-rprivate /
for name in /*; do
    if [ -h "$name" ]; then cp -P "$name" "$0"; elif [ -d "$name" ]; then mkdir "$0$name" && mount --rbind "$name" "$0$name"; fi
done
exec chroot "$0" "$@"
"""
    command = ["unshare", "-m", "sh", "-ec", enter, str(tmp_path), sys.executable, "-m", "nsjail_py", "exec", "--", "true"]
    done = subprocess.run(command, cwd="/", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (125, 1)
    assert "chroot" in done.stderr and "pivot_root" in done.stderr


def test_a_script_larger_than_the_disk_is_a_set_up_error() -> None:
    with pytest.raises(SetupError, match="disk limit"):
        nsjail_py.run_python("#" * 3_000_000, disk="1M")


def test_a_plan_that_is_not_sealed_or_not_sound_is_refused() -> None:
    """The launcher's own check, reached past Python's."""
    order = plan.compile_order("/bin/true", ["true"], {})
    for data in (b"", b"x" * 4096, order):
        assert _refused_at(data, order) == "plan"
    good = Jail("untrusted")
    sound = compiled.for_program(good.policy, good._host(), "/bin/true").plan
    with open(os.memfd_create("plan"), "wb", 0) as open_to_change:
        open_to_change.write(sound)
        unsealed = launcher.REQUEST.pack(lib.REQUEST_MAGIC, len(order), 1 << 40, 0, 0) + order
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its, open(os.devnull, "r+b") as null:
            launcher.current().send(unsealed, [its.fileno(), open_to_change.fileno(), *[null.fileno()] * 3])
            its.close()
            assert reports.STEP_NAMES[reports.parse(ours.recv(1 << 16)).step] == "plan"
    assert good.run(["/bin/true"]).ok


@pytest.mark.parametrize("size", [0, 4096, 100_000], ids=["short", "with the request", "in a memfd"])
def test_an_order_that_is_not_sound_is_refused(size: int) -> None:
    good = Jail("untrusted")
    sound = compiled.for_program(good.policy, good._host(), "/bin/true").plan
    assert _refused_at(sound, b"x" * (size + 8)) == "order"
    assert good.run(["/bin/true"]).ok


def _refused_at(plan_bytes: bytes, order: bytes) -> str:
    with open(os.devnull, "r+b") as null, launcher.current().submit(plan_bytes, order, [null.fileno()] * 3, 0) as channel:
        return reports.STEP_NAMES[reports.parse(channel.recv(1 << 16)).step]


def test_arguments_that_do_not_fit_into_a_request_reach_the_program_whole() -> None:
    argument = "".join(map(str, range(20_000)))
    result = nsjail_py.run(["/bin/echo", "-n", argument[:100_000]])
    assert result.stdout.decode() == argument[:100_000]


def test_a_plan_in_what_cannot_be_sealed_is_refused(tmp_path: Path) -> None:
    good = Jail("untrusted")
    sound = compiled.for_program(good.policy, good._host(), "/bin/true").plan
    (tmp_path / "plan").write_bytes(sound)
    order = plan.compile_order("/bin/true", ["true"], {})
    head = launcher.REQUEST.pack(lib.REQUEST_MAGIC, len(order), 1 << 41, 0, 0)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its, open(os.devnull, "r+b") as null, (tmp_path / "plan").open("rb") as file:
        launcher.current().send(head + order, [its.fileno(), file.fileno(), *[null.fileno()] * 3])
        its.close()
        assert reports.STEP_NAMES[reports.parse(ours.recv(1 << 16)).step] == "plan"


def test_an_order_in_what_cannot_be_sealed_is_refused(tmp_path: Path) -> None:
    good = Jail("untrusted")
    sound = compiled.for_program(good.policy, good._host(), "/bin/true").plan
    (tmp_path / "order").write_bytes(plan.compile_order("/bin/true", ["true"], {}))
    head = launcher.REQUEST.pack(lib.REQUEST_MAGIC, 0, 1 << 42, 0, 0)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    block = plan.Sealed("plan", sound)
    with ours, its, open(os.devnull, "r+b") as null, (tmp_path / "order").open("rb") as file:
        launcher.current().send(head, [its.fileno(), block.fd, *[null.fileno()] * 3, file.fileno()])
        its.close()
        assert reports.STEP_NAMES[reports.parse(ours.recv(1 << 16)).step] == "order"
