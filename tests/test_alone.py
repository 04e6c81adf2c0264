"""The launcher alone: a saved plan, a program, and no Python. Whatever holds for `nsjail-py exec` holds here."""

from __future__ import annotations

import fcntl
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, PATIENCE, descendants

import nsjail_py
from nsjail_py import cgroups, launcher
from nsjail_py._native import ffi
from nsjail_py.cli import CANNOT_EXECUTE, LIMIT, NOT_FOUND, SETUP
from nsjail_py.launcher import PROGRAM
from nsjail_py.policyfile import override
from nsjail_py.saved import _host, _with_checksum, save

PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
UNTRUSTED = nsjail_py.policy("untrusted")
COUNTED = bool(_host()[0])
"""Whether the launcher alone makes control groups here: not as an ordinary user, and not in a group that was delegated."""
counted = pytest.mark.elsewhere(not COUNTED, why="the launcher alone makes no control groups for a user, or in a delegated one")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for any program, one for the interpreter, one where programs may start others."""
    top = tmp_path_factory.mktemp("plans")
    save(UNTRUSTED, top / "any")
    save(UNTRUSTED, top / "python", PYTHON)
    save("moderate", top / "moderate", PYTHON)
    return top


def groups() -> set[Path]:
    """Control groups of launchers alone and of ours."""
    tops = {directory.parent for directory in launcher.current().claim.directories.values()}
    return {path for top in tops for path in top.glob(f"{cgroups.PREFIX}.*")}


def left_behind(before: set[Path]) -> list[Path]:
    """Those of callers that are gone."""
    return [path for path in groups() - before if not os.path.exists(f"/proc/{path.name.split('.')[1]}")]


@pytest.fixture(autouse=True)
def nothing_is_left(plans: Path) -> Iterator[None]:
    before = groups()
    yield
    deadline = time.monotonic() + 5  # the last processes of a killed caller may be there still
    while alone(plans / "any", "true") and (left := left_behind(before)):  # what it has left goes with the next
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alone(plan: Path, *command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([PROGRAM, plan, "--", *command], **{"capture_output": True, "timeout": 60, "check": False} | options)


def python(plans: Path, source: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return alone(plans / "python", PYTHON, "-s", "-c", source, *arguments, **options)


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("size", [6, 1 << 20])
def test_output_that_its_caller_has_no_room_for_is_an_error(plans: Path, stream: str, size: int) -> None:
    source = f"import os; os.write({1 if stream == 'stdout' else 2}, bytes({size}))"
    with open(full(), "wb") as nowhere:
        done = python(plans, source, capture_output=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: nowhere})
    assert done.returncode == SETUP
    assert stream == "stderr" or said(done) == "standard output: No space left on device"


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that says why."""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("nsjail-launcher: ")
    return line.removeprefix("nsjail-launcher: ")


def refused(plan: Path, reason: str) -> None:
    done = alone(plan, "/bin/true")
    assert done.returncode == SETUP and done.stdout == b"" and reason in said(done), done.stderr


def edited(plan: Path, edit: Callable[[Any], None]) -> None:
    """The file with another head, and a checksum that is right for it."""
    data = bytearray(plan.read_bytes())
    edit(ffi.from_buffer("struct saved *", data))
    plan.write_bytes(_with_checksum(bytes(data)))


# ---------------------------------------------------------------- streams and status


def test_streams_and_arguments_pass_through(plans: Path) -> None:
    done = python(plans, "import sys; sys.stderr.write('err'); print(sys.argv[1:], sys.stdin.read())", "a b", "", "é", input=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['a b', '', 'é'] in\n".encode(), b"err")


def test_a_large_stream_passes_both_ways_unchanged(plans: Path) -> None:
    data = os.urandom(1 << 20) * 3
    assert alone(plans / "any", "cat", input=data).stdout == data


def test_arguments_of_any_length_pass_through(plans: Path) -> None:
    """Beyond 64 KiB the order has a descriptor of its own."""
    arguments = ["x" * 30_000] * 8
    assert alone(plans / "any", "echo", *arguments).stdout == " ".join(arguments).encode() + b"\n"


def test_the_exit_status_is_the_programs_own(plans: Path) -> None:
    assert [python(plans, f"raise SystemExit({n})").returncode for n in (0, 1, 77)] == [0, 1, 77]


def test_a_signal_of_its_own_is_128_and_its_number(plans: Path) -> None:
    assert python(plans, "import os; os.kill(os.getpid(), 15)").returncode == 128 + 15


@pytest.mark.parametrize(
    ("changes", "source", "named"),
    [
        ({"wall_time": 0.2}, "import time; time.sleep(60)", "wall_time"),
        ({"cpu_time": 0.2}, "while True: pass", "cpu_time"),
        ({"idle_time": 0.2}, "import time; time.sleep(60)", "idle"),
        ({"memory": "64M"}, "x = bytearray(b'1' * (256 << 20))", "memory"),
        ({"output": 1000}, "print('x' * 100000)", "output"),
        ({"disk": "1M"}, "open('/work/f', 'wb').write(bytes(4 << 20))", "disk"),
        ({"file_size": "1M"}, "import signal; signal.signal(25, signal.SIG_DFL); open('/work/f', 'wb').write(bytes(2 << 20))", "disk"),
        ({"syscalls": {"on_denied": "kill"}}, "import os; os.fork()", "syscall"),
    ],
)
def test_a_reached_limit_is_124_and_named(changes: dict[str, Any], source: str, named: str, tmp_path: Path) -> None:
    save(override(UNTRUSTED, **changes), tmp_path / "python", PYTHON)
    done = python(tmp_path, source, stdin=subprocess.DEVNULL)
    if named == "memory" and not COUNTED:  # each process has its own limit then, and meets it as an error of its own
        assert b"MemoryError" in done.stderr
        return
    assert done.returncode == LIMIT and done.stderr.decode().splitlines()[-1].startswith(f"nsjail-launcher: {named}: "), done.stderr


def test_a_signal_that_limits_give_is_the_programs_own_where_there_is_no_such_limit(plans: Path) -> None:
    source = "import os, signal; signal.signal(25, signal.SIG_DFL); os.kill(os.getpid(), 25)"
    assert python(plans, source).returncode == 128 + signal.SIGXFSZ


def test_no_more_than_the_limit_of_output_passes(tmp_path: Path) -> None:
    save(override(UNTRUSTED, output=1000), tmp_path / "python", PYTHON)
    assert len(python(tmp_path, "print('x' * 100000)").stdout) == 1000


def test_a_limit_holds_while_the_caller_is_stopped(tmp_path: Path) -> None:
    save(override(UNTRUSTED, wall_time=0.5), tmp_path / "python", PYTHON)
    process = subprocess.Popen(
        [PROGRAM, tmp_path / "python", "--", PYTHON, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    assert [pid for pid in descendants(process.pid) if state(pid) not in "Z"] in ([], descendants(process.pid)[:1])
    process.send_signal(signal.SIGCONT)
    assert process.wait(10) == LIMIT


def test_a_program_that_is_not_there_is_127_and_one_that_cannot_be_executed_126(plans: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    assert (found := alone(plans / "any", "no-such-program")).returncode == NOT_FOUND and "no such program" in said(found)
    assert (found := alone(plans / "any", "/no/such")).returncode == NOT_FOUND and "No such file" in said(found)
    assert (found := alone(plans / "any", str(tmp_path / "text"))).returncode == CANNOT_EXECUTE and "Permission denied" in said(found)
    (tmp_path / "text").chmod(0o755)
    assert (found := alone(plans / "any", str(tmp_path / "text"))).returncode == CANNOT_EXECUTE and "Exec format error" in said(found)


def test_a_path_that_no_program_can_have_is_126(plans: Path) -> None:
    done = alone(plans / "any", "/" + "x" * 5000)
    assert done.returncode == CANNOT_EXECUTE and done.stderr.startswith(b"nsjail-launcher: /xxx")


def test_a_name_cannot_write_to_the_callers_terminal(plans: Path) -> None:
    done = alone(plans / "any", "/no\nsuch\x1b[2J")
    assert said(done) == "/no?such?[2J: No such file or directory"


def test_a_relative_path_in_a_directory_that_is_gone_is_an_error(plans: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = alone(plans / "any", "./true", cwd=tmp_path / "gone", preexec_fn=(tmp_path / "gone").rmdir)
    assert done.returncode == SETUP and said(done) == "working directory: No such file or directory"


def test_a_directory_is_no_standard_input(plans: Path, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    done = alone(plans / "any", "cat", stdin=directory)
    os.close(directory)
    assert done.returncode == SETUP and said(done) == "standard input: is a directory"


def test_too_few_arguments_say_how_it_is_used(plans: Path) -> None:
    for command in ([plans / "any"], [plans / "any", "--"], [plans / "any", "true", "x"]):
        done = subprocess.run([PROGRAM, *command], capture_output=True, check=False, timeout=60)
        assert done.returncode == SETUP and said(done) == "usage: nsjail-launcher FILE -- CMD [ARGS...]"


def test_a_program_that_the_root_shows_has_its_own_path_inside_and_any_other_the_plans(tmp_path: Path) -> None:
    save("trusted", tmp_path / "plan")
    shutil.copy(shutil.which("readlink") or "", tmp_path / "own")
    assert alone(tmp_path / "plan", "readlink", "/proc/self/exe").stdout == b"/usr/bin/readlink\n"
    assert alone(tmp_path / "plan", str(tmp_path / "own"), "/proc/self/exe").stdout == b"/app/program\n"


@pytest.mark.parametrize(("root", "seen"), [("system", False), ("host", True)])
def test_a_program_in_opt_runs_under_every_root_of_the_host_s(root: str, seen: bool, in_opt: Path, tmp_path: Path) -> None:
    save(override(nsjail_py.policy("moderate"), root=root), tmp_path / "plan")
    program = shutil.copy(shutil.which("readlink") or "", in_opt)
    assert alone(tmp_path / "plan", program, "/proc/self/exe").stdout.decode() == f"{program if seen else '/app/program'}\n"


@pytest.mark.skipif(not IS_ROOT, reason="only root can make one that is another's")
@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_a_launcher_that_is_set_user_id_refuses_to_run(mode: int, plans: Path, tmp_path: Path) -> None:
    if os.statvfs(tmp_path).f_flag & os.ST_NOSUID:
        pytest.skip("nosuid")
    shutil.copy(PROGRAM, tmp_path / "launcher")
    os.chown(tmp_path / "launcher", 65534, 65534)
    (tmp_path / "launcher").chmod(mode)
    done = subprocess.run([tmp_path / "launcher", plans / "any", "--", "true"], capture_output=True, check=False, timeout=60)
    assert done.returncode == SETUP and done.stderr.endswith(b"the launcher must not be set-user-id\n")


@pytest.mark.skipif(
    "SANITIZED" in os.environ, reason="the sanitizers' launcher has libraries, and the loader says first that it cannot open them"
)
def test_a_caller_without_descriptors_gets_an_error_that_leaves_nothing(plans: Path) -> None:
    seen = set()
    for most in (*range(3, 40), resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        before = groups()
        done = alone(plans / "any", "echo", "x", preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)))
        assert (done.returncode, done.stdout) in ((0, b"x\n"), (SETUP, b"")), (most, done)
        assert done.returncode == 0 or done.stderr.splitlines()[-1].startswith(b"nsjail-launcher: "), (most, done)
        assert b"No such file" not in done.stderr, most  # what cannot be opened is there
        assert not left_behind(before), most
        seen.add(done.returncode)
    assert seen == {0, SETUP}


def test_a_caller_who_may_write_no_files_gets_an_error(plans: Path) -> None:
    done = alone(plans / "any", "echo", "x", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert (done.returncode, done.stdout) == (SETUP, b"") and said(done) == "plan: File too large"


def test_a_plan_for_one_program_runs_no_other(plans: Path) -> None:
    done = alone(plans / "python", "/bin/true")
    assert done.returncode == CANNOT_EXECUTE and "compile one for it" in said(done)


def test_any_program_of_the_callers_own_runs(plans: Path, tmp_path: Path) -> None:
    shutil.copy("/bin/echo", tmp_path / "own")
    assert alone(plans / "any", "./own", "hi", cwd=tmp_path).stdout == b"hi\n"


def test_closed_standard_streams_are_no_streams_of_somebody_else(plans: Path) -> None:
    command = f"'{PROGRAM}' '{plans / 'python'}' -- '{PYTHON}' -c 'import os; print(sorted(os.listdir(\"/proc/self/fd\"))[:4])'"
    assert subprocess.run(["/bin/sh", "-c", f"{command} <&- 2>&-"], capture_output=True, check=False, timeout=60).stdout
    assert subprocess.run(["/bin/sh", "-c", f"{command} <&- >&- 2>&-"], check=False, timeout=60).returncode == 0


def test_a_reader_that_leaves_ends_a_writer_as_without_a_jail(plans: Path) -> None:
    command = f"'{PROGRAM}' '{plans / 'any'}' -- yes | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, check=False, timeout=60)
    assert done.stdout.split() == [b"y", b"141"], done.stderr


def test_all_that_a_program_has_written_when_it_ends_is_passed_on(plans: Path) -> None:
    """It may have made the pipe larger than the launcher reads at once."""
    source = "import fcntl, os; fcntl.fcntl(1, 1031, 1 << 20); assert os.write(1, bytes(1 << 20)) == 1 << 20"
    with subprocess.Popen([PROGRAM, plans / "python", "--", PYTHON, "-c", source], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.5)  # the program ends while nobody reads
        assert len(process.stdout.read()) == 1 << 20
    assert process.returncode == 0


def ignore_nothing() -> None:
    """As a program that a terminal has started, also where the suite runs under nohup or behind an `&`."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on_to_the_program(number: signal.Signals, plans: Path) -> None:
    source = "import signal, sys, time\nfor n in (1, 2, 10, 15): signal.signal(n, lambda s, f: sys.exit(s))\nprint(1, flush=True)\n"
    source += "while True: time.sleep(0.01)"  # a signal just before a long one would wait for its end
    process = subprocess.Popen([PROGRAM, plans / "python", "--", PYTHON, "-c", source], stdout=subprocess.PIPE, preexec_fn=ignore_nothing)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    process.send_signal(number)
    assert process.wait(10) == number


def test_a_signal_that_the_program_does_not_handle_ends_it(plans: Path) -> None:
    command = [PROGRAM, plans / "any", "--", "cat"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=ignore_nothing)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"x")
    process.stdin.flush()
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT


FLOOD = """
import os, signal, time
signal.signal(10, lambda number, frame: os._exit(3))
signal.signal(2, signal.SIG_IGN)
print("begun", flush=True)
try:
    while True: os.write(1, bytes(65536))
except OSError:
    os._exit(7)
"""


def until_full(pipe: int) -> None:
    """Until the writer has to wait."""
    waiting, room = 0, fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) - select.PIPE_BUF
    while waiting <= room:
        time.sleep(0.05)
        waiting = int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.fixture
def stuck(plans: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run whose output nobody takes; SIGINT does not end the program, SIGUSR1 does with status 3, and that nobody reads any more with 7."""
    process = subprocess.Popen([PROGRAM, plans / "python", "--", PYTHON, "-c", FLOOD], stdout=subprocess.PIPE, preexec_fn=ignore_nothing)
    assert process.stdout is not None and process.stdout.read(6) == b"begun\n"
    until_full(process.stdout.fileno())
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("attempt", range(5))  # the program's own end, when its pipe is closed, is no part of it
def test_a_signal_ends_a_run_whose_output_nobody_takes(attempt: int, stuck: subprocess.Popen[bytes]) -> None:
    stuck.send_signal(signal.SIGINT)
    assert stuck.wait(10) == 128 + signal.SIGINT


def test_a_signal_without_a_meaning_reaches_a_program_whose_output_nobody_takes(stuck: subprocess.Popen[bytes]) -> None:
    stuck.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    stuck.communicate(timeout=10 * PATIENCE)
    assert stuck.returncode == 3


def test_a_terminal_is_carried_and_never_given(plans: Path) -> None:
    ours, its = pty.openpty()
    with os.fdopen(its) as terminal:
        source = "import os; print([os.isatty(n) for n in range(3)])"
        process = subprocess.Popen(
            [PROGRAM, plans / "python", "--", PYTHON, "-c", source], stdin=terminal, stdout=terminal, stderr=terminal
        )
        assert process.wait(20) == 0
    assert b"[False, False, False]" in os.read(ours, 1000)
    os.close(ours)


def test_a_step_that_fails_is_named_with_its_errno(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    save(override(UNTRUSTED, mounts=[nsjail_py.Mount(source=str(shown), target="/shown")]), tmp_path / "plan")
    shown.rmdir()
    refused(tmp_path / "plan", "mount source: No such file or directory")


# ---------------------------------------------------------------- what it is made of


def test_only_what_the_policy_names_is_in_the_environment(tmp_path: Path) -> None:
    policy = override(UNTRUSTED, env={"OWN": "1", "BOTH": "policy"}, env_pass=("PASSED", "BOTH", "ABSENT", "LANG"))
    save(policy, tmp_path / "python", PYTHON)
    environment = {"PASSED": "x=y", "BOTH": "caller", "SECRET": "s3cret", "LANG": "C.utf8"}
    done = python(tmp_path, "import os; print(sorted(os.environ.items()))", env=environment)
    wanted = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/work", "LANG": "C.utf8", "USER": "jail", "TMPDIR": "/tmp"}
    assert done.stdout.decode().strip() == str(sorted((wanted | {"OWN": "1", "BOTH": "policy", "PASSED": "x=y"}).items()))


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.fixture
def running(plans: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A run that has begun, and the processes behind it: launcher, init, program."""
    command = [PROGRAM, plans / "python", "--", PYTHON, "-c", "import time; print(1, flush=True); time.sleep(60)", "s3cret-argument"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={"SECRET": "s3cret-variable"})
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    yield process, descendants(process.pid)
    process.kill()
    process.wait()


def test_launcher_and_init_know_nothing_of_the_callers_environment(running: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    ours, init, program = running[1]
    for pid in (ours, init):
        if IS_ROOT:
            assert Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0") == b""
        assert Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0") == b"nsjail-launcher"
    assert os.getsid(ours) not in (os.getsid(0), os.getsid(program))


@pytest.mark.parametrize("victim", ["caller", "launcher", "init"])
def test_whoever_is_killed_leaves_no_process(victim: str, running: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, processes = running
    os.kill({"caller": process.pid, "launcher": processes[0], "init": processes[1]}[victim], signal.SIGKILL)
    status = process.wait(10)
    deadline = time.monotonic() + 5
    while any(state(pid) != "Z" for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(state(pid) == "Z" for pid in processes)
    assert status == (-signal.SIGKILL if victim == "caller" else SETUP)


@counted
def test_control_groups_of_a_killed_caller_go_with_the_next(running: tuple[subprocess.Popen[bytes], list[int]], plans: Path) -> None:
    process, processes = running
    process.kill()
    process.wait()
    while any(state(pid) != "Z" for pid in processes):
        time.sleep(0.01)
    alone(plans / "any", "/bin/true")
    assert [path for path in groups() if path.name.split(".")[1] == str(process.pid)] == []


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user has one id")
def test_runs_at_one_time_have_users_of_their_own(plans: Path) -> None:
    command = [PROGRAM, plans / "any", "--", "cat"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    users = set()
    for process in processes:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)
        users.add(os.stat(f"/proc/{descendants(process.pid)[-1]}").st_uid)
    for process in processes:
        process.communicate()
    assert len(users) == 3 and all(user >= launcher.UID_BASE for user in users)


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user has one id")
def test_a_run_without_an_id_of_its_own_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(launcher, "UID_BLOCKS", 2)
    save(UNTRUSTED, tmp_path / "plan")
    assert alone(tmp_path / "plan", "true").returncode == 0
    locks = [os.open(tmp_path / f"locks/uids-{block}", os.O_RDWR | os.O_CREAT) for block in range(2)]
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    refused(tmp_path / "plan", "all 2 blocks of host ids are in use")
    os.close(locks.pop())
    assert alone(tmp_path / "plan", "true").returncode == 0
    os.close(locks.pop())


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user has one id")
def test_a_lock_that_cannot_be_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LOCKS", tmp_path / "locks")
    save(UNTRUSTED, tmp_path / "plan")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/uids-0").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "plan", f"uid pool: Too many levels of symbolic links ({tmp_path}/locks/uids-0)")
    assert not (tmp_path / "elsewhere").exists()
    shutil.rmtree(tmp_path / "locks")
    (tmp_path / "locks").symlink_to(tmp_path / "none")
    refused(tmp_path / "plan", "uid pool: ")
    (tmp_path / "locks").unlink()
    monkeypatch.setattr(launcher, "LOCKS", tmp_path / "none/locks")
    save(UNTRUSTED, tmp_path / "plan")
    refused(tmp_path / "plan", f"uid pool: No such file or directory ({tmp_path}/none/locks)")


@pytest.mark.elsewhere(not IS_ROOT or launcher.current().claim.kind != "v1", why="root's control groups of version 1 are not here")
@pytest.mark.parametrize("field", ["controller", "root"])
def test_a_plan_whose_control_groups_are_not_here_does_not_start(field: str, tmp_path: Path) -> None:
    def edit(head: Any) -> None:
        group = ffi.cast("struct saved_group *", ffi.cast("char *", head) + head.groups.offset)[0]
        setattr(group, field, head.release)  # a string that is neither

    save(UNTRUSTED, tmp_path / "plan")
    edited(tmp_path / "plan", edit)
    before = groups()
    refused(tmp_path / "plan", "cgroup: No such file or directory")
    assert not left_behind(before)


@counted
def test_processes_and_memory_are_counted_together(tmp_path: Path) -> None:
    save(override(nsjail_py.policy("moderate"), memory="64M"), tmp_path / "python", PYTHON)
    source = "import os\nfor _ in range(3):\n  if os.fork() == 0: x = bytearray(b'1' * (30 << 20)); os.read(0, 1)\nos.wait()"
    process = subprocess.run([PROGRAM, tmp_path / "python", "--", PYTHON, "-c", source], capture_output=True, check=False, timeout=60)
    assert process.returncode == LIMIT and b"memory" in process.stderr


@counted
def test_the_groups_of_a_caller_that_cannot_be_looked_at_are_not_taken_for_a_dead_one_s(plans: Path) -> None:
    ours = [top / cgroups._name() for top in {directory.parent for directory in launcher.current().claim.directories.values()}]
    for directory in ours:
        directory.mkdir()
    try:
        for most in range(3, 24):  # with one of them the last descriptor goes to the directory that is swept
            alone(plans / "any", "true", preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)))
            assert all(directory.is_dir() for directory in ours), most
    finally:
        for directory in ours:
            if directory.is_dir():
                directory.rmdir()


def test_descriptors_that_a_program_keeps_on_their_way_cost_the_same_user_no_other_run(plans: Path) -> None:
    keep = """
import socket, sys
pairs = [socket.socketpair() for _ in range(2)]
for ours, _ in pairs: socket.send_fds(ours, [b"x"], [0] * 250)
print("sent", flush=True)
sys.stdin.read()
"""
    command = [PROGRAM, plans / "python", "--", PYTHON, "-s", "-c", keep]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"sent\n"
        few = (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        done = alone(plans / "any", "true", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))
        assert done.returncode == 0, done.stderr
        other.communicate()
