"""systemd: what a service tells it, what it is told in the journal, and the units that are written. The last part runs real units, where there is systemd."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, PATIENCE, ROOT
from msgspec.structs import replace

import nsjail_py
from nsjail_py import cli, hostinfo, launcher, systemd, unitfile
from nsjail_py.result import Protection


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a manager, or its journal, listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(10)
        yield listening


def entry(message: bytes) -> dict[str, bytes]:
    """A message in the journal's own protocol, each field with its length."""
    fields = {}
    while message:
        name, _, rest = message.partition(b"\n")
        size = int.from_bytes(rest[:8], "little")
        fields[name.decode()] = rest[8 : 8 + size]
        assert rest[8 + size : 9 + size] == b"\n"
        message = rest[9 + size :]
    return fields


# ---------------------------------------------------------------- a resident service


def test_ready_is_said_when_there_is_a_launcher_and_stopping_before_it_goes(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", ear.getsockname())
    with systemd.Resident(status="at your service"):
        assert ear.recv(999) == b"READY=1\nSTATUS=at your service"
        assert launcher.peek() is not None
        assert nsjail_py.run(["/bin/true"]).ok
    assert ear.recv(999) == b"STOPPING=1"
    assert launcher.peek() is None


WAYS = {
    "asleep": "with systemd.Resident(): time.sleep(60)",
    "in a run": "with systemd.Resident(): nsjail_py.run(['/bin/sleep', '60'])",
    "asyncio": "async def main():\n  with systemd.Resident(): await asyncio.sleep(60)\nasyncio.run(main())",
    "asyncio, in a run": "async def main():\n  with systemd.Resident(): await nsjail_py.aio.run(['/bin/sleep', '60'])\nasyncio.run(main())",
    "asyncio, at work": "async def main():\n  with systemd.Resident():\n    while True: await asyncio.sleep(0)\nasyncio.run(main())",
}


def resident(ear: socket.socket, code: str) -> subprocess.Popen[str]:
    """A process that has said READY=1."""
    lines = f"import asyncio, os, signal, sys, time, nsjail_py\nfrom nsjail_py import systemd\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", lines], env=os.environ | {"NOTIFY_SOCKET": ear.getsockname()}, stdout=subprocess.PIPE, text=True
    )
    assert ear.recv(999).startswith(b"READY=1")
    return process


@pytest.mark.parametrize("way", WAYS)
def test_a_service_that_is_stopped_leaves_its_block_and_succeeds(way: str, ear: socket.socket) -> None:
    with resident(ear, f"import atexit; atexit.register(print, 'left')\n{WAYS[way]}") as process:
        time.sleep(0.3)
        process.terminate()
        assert ear.recv(999) == b"STOPPING=1"
        assert (process.communicate()[0], process.returncode) == ("left\n", 0)


def test_a_service_that_is_told_twice_to_stop_ends_at_once(ear: socket.socket) -> None:
    code = "with systemd.Resident():\n  try: print(1, flush=True); time.sleep(60)\n  finally: print(2, flush=True); time.sleep(60)"
    with resident(ear, code) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        process.terminate()
        assert process.stdout.readline() == "2\n"
        process.terminate()
        assert process.wait() == -signal.SIGTERM


def test_a_fork_of_a_service_ends_by_the_signal_and_says_nothing(ear: socket.socket) -> None:
    code = (
        "with systemd.Resident():\n  told, tell = os.pipe()\n  child = os.fork()\n  if not child: os.write(tell, b'.'); time.sleep(60); os._exit(1)\n"
        "  os.read(told, 1); os.kill(child, signal.SIGTERM); print(os.wait()[1])"
    )
    with resident(ear, code) as process:
        assert process.communicate()[0] == f"{signal.SIGTERM:d}\n"
    assert ear.recv(999) == b"STOPPING=1"
    ear.setblocking(False)
    with pytest.raises(BlockingIOError):
        ear.recv(999)


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None], ids=["default", "ignored", "handled"])
def test_what_the_caller_does_at_sigterm_is_as_it_was(action: Any) -> None:
    before = signal.signal(signal.SIGTERM, action)
    try:
        with systemd.Resident():
            assert (signal.getsignal(signal.SIGTERM) == action) == (action != signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) == action
        with systemd.Resident():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "it is his again when he has set it within"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_the_action_of_sigterm_stays() -> None:
    def enter() -> signal.Handlers | int | Callable[..., Any] | None:
        with systemd.Resident():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        assert pool.submit(enter).result() == signal.getsignal(signal.SIGTERM)


@pytest.fixture
def fed(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a manager hears that a service is ready, and then that it lives."""
    monkeypatch.setenv("NOTIFY_SOCKET", ear.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    with systemd.Resident():
        assert ear.recv(999).startswith(b"READY=1")
        assert ear.recv(999) == b"WATCHDOG=1"
        yield ear


def test_the_watchdog_is_fed_while_a_launcher_can_be_had(fed: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    first = launcher.current()
    os.kill(first.pid, 9)
    while launcher.current() is first:
        assert fed.recv(999) == b"WATCHDOG=1"
    assert launcher.current().alive
    monkeypatch.setattr(launcher, "PROGRAM", Path("/nonexistent"))
    os.kill(launcher.current().pid, 9)
    time.sleep(0.3)
    fed.setblocking(False)
    with pytest.raises(BlockingIOError):
        while fed.recv(999):
            pass
    time.sleep(0.3)
    with pytest.raises(BlockingIOError):
        fed.recv(999)


def test_the_watchdog_is_not_fed_while_the_launcher_hangs(fed: socket.socket) -> None:
    pid = launcher.current().pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.2)
        fed.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while fed.recv(999):  # for what it had answered before
                pass
        time.sleep(0.5)
        with pytest.raises(BlockingIOError):
            fed.recv(999)
    finally:
        os.kill(pid, signal.SIGCONT)
    fed.settimeout(10)
    assert fed.recv(999) == b"WATCHDOG=1"
    assert launcher.current().pid == pid
    assert nsjail_py.run(["/bin/true"]).ok


def test_a_service_can_be_left_while_its_launcher_hangs(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it has taken so little that nobody can ask it any more."""
    monkeypatch.setenv("NOTIFY_SOCKET", ear.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setattr(launcher, "END_S", 0.1)

    def fill() -> None:
        with contextlib.suppress(OSError):
            while True:
                launcher.current().send(bytes(60000), [])

    with systemd.Resident():
        os.kill(launcher.current().pid, signal.SIGSTOP)
        filling = threading.Thread(target=fill, daemon=True)
        filling.start()
        time.sleep(0.3)
        assert filling.is_alive()
        began = time.monotonic()
    assert time.monotonic() - began < 3 * PATIENCE
    filling.join(10)
    assert not filling.is_alive()


def test_no_run_waits_while_the_watchdogs_thread_looks_at_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    with systemd.Resident():
        nsjail_py.run(["/bin/true"])
        began = time.monotonic()
        for _ in range(20):
            nsjail_py.run(["/bin/true"]).check()
        assert time.monotonic() - began < 1 * PATIENCE


def test_a_watchdog_of_another_process_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_interval() == 0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert systemd.watchdog_interval() == 0.05


def test_without_a_manager_nothing_is_said_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent")
    assert not systemd.notify("READY=1")
    assert not systemd.has_journal()
    with systemd.Resident():
        assert nsjail_py.run(["/bin/true"]).ok


# ---------------------------------------------------------------- the journal


def test_a_run_is_an_entry_with_its_verdict_and_use(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "JOURNAL", ear.getsockname())
    result = nsjail_py.run_python("import socket; socket.socket()", policy="untrusted")
    assert systemd.journal(result, NSJAIL_JOB="line one\nMESSAGE=forged")
    fields = entry(ear.recv(1 << 16))
    assert fields["NSJAIL_VERDICT"] == b"exit"
    assert fields["NSJAIL_POLICY"] == b"untrusted"
    assert fields["NSJAIL_EXIT_CODE"] == b"1"
    assert fields["NSJAIL_DENIED"] == b"socket:1"
    assert fields["MESSAGE"] == result.summary.encode()
    assert fields["NSJAIL_JOB"] == b"line one\nMESSAGE=forged"
    assert int(fields["NSJAIL_MEMORY_PEAK"]) == result.peak_memory
    assert fields["PRIORITY"] == b"6"


def test_a_limit_is_a_warning(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "JOURNAL", ear.getsockname())
    assert systemd.journal(nsjail_py.run(["/bin/sleep", "9"], wall_time=0.2))
    assert entry(ear.recv(1 << 16))["PRIORITY"] == b"4"


def test_a_run_that_never_was_is_an_entry_with_the_step_that_failed(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "JOURNAL", ear.getsockname())
    error = nsjail_py.SetupError("user namespace", errno.ENOSPC)
    assert systemd.journal(error, NSJAIL_JOB="mine")
    assert entry(ear.recv(1 << 16)) == {
        "SYSLOG_IDENTIFIER": b"nsjail-py",
        "MESSAGE": str(error).encode(),
        "PRIORITY": b"3",
        "NSJAIL_ERROR": b"SetupError",
        "NSJAIL_STEP": b"user namespace",
        "NSJAIL_JOB": b"mine",
    }
    assert systemd.journal(nsjail_py.PolicyError("no"))
    fields = entry(ear.recv(1 << 16))
    assert fields["NSJAIL_ERROR"] == b"PolicyError" and "NSJAIL_STEP" not in fields


def test_every_field_of_an_entry_is_documented(ear: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "JOURNAL", ear.getsockname())
    text = (ROOT / "docs/systemd.md").read_text()
    result = replace(nsjail_py.run_python("import socket; socket.socket()"), signal=signal.SIGTERM)
    for run in (replace(result, protections=(Protection("x", "unavailable", "y"),)), nsjail_py.SetupError("clone")):
        systemd.journal(run)
        fields = [name.removeprefix("NSJAIL") for name in entry(ear.recv(1 << 16)) if name.startswith("NSJAIL")]
        assert not [name for name in fields if not re.search(rf"(NSJAIL|[ ,`]){name}\b", text)]


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [("", 1, ("NSJAIL_VERDICT", b"exit")), ("launcher.PROGRAM = '/nonexistent'", 125, ("NSJAIL_STEP", b"launcher"))],
    ids=["a run", "no launcher"],
)
def test_the_command_writes_an_entry_when_its_errors_go_to_the_journal(
    change: str, status: int, field: tuple[str, bytes], ear: socket.socket
) -> None:
    code = (
        "import os, sys; from nsjail_py import cli, launcher, systemd\n"
        "systemd.JOURNAL = sys.argv.pop(1)\n"
        "status = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{status.st_dev}:{status.st_ino}'\n"
        f"{change}\nsys.exit(cli.main(['exec', '--', '/bin/false']))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, ear.getsockname()], check=False).returncode == status
    assert field in entry(ear.recv(1 << 16)).items()


# ---------------------------------------------------------------- units that are written


def written(to: Path, *words: str) -> list[Path]:
    assert cli.main(["systemd", "unit", "--output", str(to), *words]) == 0
    return sorted(to.iterdir())


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="doctor: systemd does not run this machine, and is not installed to check units with"
)
@pytest.mark.parametrize("policy", ["trusted", "moderate", "untrusted"])
@pytest.mark.parametrize("options", [[], ["--user", "daemon"], ["--listen", "/run/jail.sock"]], ids=["root", "user", "socket"])
def test_systemd_finds_no_fault_in_a_unit(policy: str, options: list[str], tmp_path: Path) -> None:
    limits = '[limits]\ncpus = 1.255\ncpuset = "0-1,4"\n'
    (tmp_path / "mine.toml").write_text(f'extends = "{policy}"\nworkdir = \'/srv/100% $HOME "it" \\n\'\n{limits}')
    to = tmp_path / "units"
    to.mkdir()
    files = written(to, *options, str(tmp_path / "mine.toml"), "--", "/usr/bin/sort", "-k", "2", '100% $HOME "it\'s" \\n')
    assert len(files) == (2 if "--listen" in options else 1)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "jail" in line.partition(":")[0]]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="doctor: systemd does not run this machine, and is not installed to check units with"
)
@pytest.mark.parametrize(
    "options",
    [{"listen": "/" + "a" * 106}, {"listen": "@" + "a" * 106}, {"listen": "/" + "ä" * 53}, {"user": "4294967294"}, {"user": "0"}, {}],
    ids=str,
)
def test_systemd_takes_what_is_just_allowed(options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "$HOME 1% p"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(unitfile.sys, "executable", str(python))
    files = unitfile.unit(nsjail_py.policy("untrusted"), "untrusted", ["/bin/cat"], "jail", **options)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *(tmp_path / name for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "jail" in line.partition(":")[0]]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.parametrize("letter", ["'", '"', "\\"])
def test_an_interpreter_that_systemd_does_not_start_is_an_error(letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unitfile.sys, "executable", f"/srv/{letter}/python3")
    with pytest.raises(nsjail_py.PolicyError, match="interpreter"):
        unitfile.unit(nsjail_py.policy("untrusted"), "untrusted", ["/bin/cat"], "jail")


def test_a_unit_of_a_connection_goes_however_it_ended(tmp_path: Path) -> None:
    listening, template = written(tmp_path, "--listen", "/run/jail.sock", "untrusted", "--", "/bin/cat")
    assert settings_of(template)["CollectMode"] == "inactive-or-failed"
    assert "CollectMode" not in settings_of(listening)


def test_every_line_of_a_unit_has_its_reason(tmp_path: Path) -> None:
    for file in written(tmp_path, "--listen", "/run/jail.sock", "untrusted", "--", "/bin/cat"):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("[")]
        assert [line.startswith("# ") for line in lines] == [True, False] * (len(lines) // 2)


def settings_of(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line and line[0] != "#")


def test_a_units_limits_are_the_policys_and_what_nsjail_py_needs_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "untrusted"\n[limits]\ncpus = 0.255\ncpuset = "0,2-3"\n')
    (tmp_path / "units").mkdir()
    limits = nsjail_py.policy("untrusted").limits
    (file,) = written(tmp_path / "units", str(tmp_path / "mine.toml"), "--", "/bin/cat")
    settings = settings_of(file)
    assert limits.memory < int(settings["MemoryMax"]) < limits.memory + (256 << 20)
    assert limits.processes < int(settings["TasksMax"]) < limits.processes + 32
    assert limits.wall_time < int(settings["RuntimeMaxSec"]) < limits.wall_time + 60
    assert (settings["CPUQuota"], settings["AllowedCPUs"]) == ("126%", "0,2-3")


def test_what_a_policy_does_not_limit_a_unit_does_not() -> None:
    policy = nsjail_py.policy("untrusted")
    none = dict.fromkeys(("memory", "processes", "wall_time", "cpus", "cpuset"))
    (text,) = unitfile.unit(replace(policy, limits=replace(policy.limits, **none)), "p", ["/bin/cat"], "jail").values()
    assert not [name for name in ("MemoryMax=", "TasksMax=", "RuntimeMaxSec=", "CPUQuota=", "AllowedCPUs=") if name in text]


def test_a_unit_hides_no_directory_that_its_program_or_policy_is_in(tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"  # below /tmp
    policy.write_text('extends = "untrusted"\n')
    (tmp_path / "units").mkdir()
    (file,) = written(tmp_path / "units", str(policy), "--", "/home/me/program")
    assert not {"ProtectHome=yes", "PrivateTmp=yes"} & set(file.read_text().splitlines())


def test_a_unit_that_is_told_to_stop_has_not_failed(tmp_path: Path, cli: list[str]) -> None:
    (file,) = written(tmp_path, "moderate", "--", "/bin/sleep", "60")
    words = [*cli, "exec", "--policy", "moderate", "--", "/bin/sh", "-c", "echo; read line"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None and command.stdout.readline()
        command.terminate()
        assert settings_of(file)["SuccessExitStatus"] == str(command.wait())


@pytest.mark.parametrize("words", [["untrusted", "--"], ["untrusted", "--name", "x", "--", "/bin/cat"]])
def test_a_unit_without_a_program_is_an_error(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systemd", "unit", *words]) == 125
    assert "no program was given" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a/b", "", "a b", "../x"])
def test_a_name_that_is_no_units_is_an_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systemd", "unit", "--name", name, "untrusted", "--", "/bin/cat"]) == 125
    assert "name" in capfd.readouterr().err


@pytest.mark.parametrize("letter", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\udcff"], ids=ascii)
@pytest.mark.parametrize("where", ["argument", "program", "user", "listen", "mount", "workdir"])
def test_nothing_adds_a_line_to_a_unit(letter: str, where: str) -> None:
    word = f"/srv/a{letter}ExecStartPre=/bin/evil{letter}"
    policy = nsjail_py.policy("moderate")
    if where == "mount":
        policy = replace(policy, mounts=(nsjail_py.Mount(source=word, target="/srv", writable=True),))
    elif where == "workdir":
        policy = replace(policy, workdir=word)
    command = [word if where == "program" else "/bin/cat", word if where == "argument" else ""]
    options = {where: word} if where in ("user", "listen") else {}
    with pytest.raises(nsjail_py.PolicyError) as caught:
        unitfile.unit(policy, "/etc/p.toml", command, "jail", **options)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("option", "word"), [
    ("user", "%i"), ("user", "a b"), ("user", "-x"), ("user", "a/b"),
    ("user", "4294967295"), ("user", "9" * 20), ("user", "65535"), ("user", "007"),
    ("listen", "/" + "a" * 107), ("listen", "@" + "a" * 107), ("listen", "/" + "ä" * 54), ("listen", "/"), ("listen", "@"), ("listen", "/a/../b"),
    ("listen", "080"), ("listen", "127.0.0.1:080"), ("listen", "[::1]:00080"), ("listen", "0"), ("listen", "[::1%lo]:80"),
    ("listen", "localhost:80"), ("listen", "run/x"), ("listen", "1.2.3.4:99999"), ("listen", "1.2.3:80"), ("listen", "/a b"), ("listen", "/a\\"),
])  # fmt: skip
def test_a_user_or_an_address_that_is_none_is_an_error(option: str, word: str) -> None:
    with pytest.raises(nsjail_py.PolicyError, match=option):
        unitfile.unit(nsjail_py.policy("untrusted"), "untrusted", ["/bin/cat"], "jail", **{option: word})


@pytest.mark.parametrize("listen", ["/run/100%.sock", "@jail", "127.0.0.1:80", "[::1]:80", "80"])
def test_no_specifier_is_expanded_in_an_address(listen: str) -> None:
    text = unitfile.unit(nsjail_py.policy("untrusted"), "untrusted", ["/bin/cat"], "jail", listen=listen)["jail.socket"]
    assert f"\nListenStream={listen.replace('%', '%%')}\n" in text


def test_a_path_that_may_be_written_is_the_policys_to_the_letter() -> None:
    """systemd expands variables in a command only, and not behind a colon; specifiers, quotes and backslashes everywhere."""
    policy = replace(nsjail_py.policy("moderate"), workdir='/srv/$a %h "b" \\t')
    assert '\nReadWritePaths="/srv/$a %%h \\"b\\" \\\\t"\n' in unitfile.unit(policy, "p", ["/bin/echo", "$x"], "jail")["jail.service"]
    assert '/bin/echo "$x"\n' in unitfile.unit(policy, "p", ["/bin/echo", "$x"], "jail")["jail.service"]


def test_a_description_goes_on_in_no_other_line() -> None:
    text = unitfile.unit(nsjail_py.policy("moderate"), "p", ["/bin/x\\"], "jail")["jail.service"]
    assert "\nDescription=A jail: /bin/x\\\\\n" in text


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """nsjail-py lies in /usr."""
    for name in ("prefix", "base_prefix"):
        monkeypatch.setattr(unitfile.sys, name, "/usr")
    monkeypatch.setattr(unitfile, "__file__", "/usr/lib/unitfile.py")


def hides(policy: nsjail_py.Policy, **options: Any) -> set[str]:
    lines = unitfile.unit(policy, "/etc/p.toml", ["/bin/sh"], "jail", **options)["jail.service"].splitlines()
    return {"ProtectHome=yes", "PrivateTmp=yes"} & set(lines)


def shows(source: str) -> dict[str, tuple[nsjail_py.Mount]]:
    return {"mounts": (nsjail_py.Mount(source=source, target="/srv"),)}


HOMES, TEMPORARY = "ProtectHome=yes", "PrivateTmp=yes"


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("changes", "hidden"),
    [
        ({}, {HOMES, TEMPORARY}),
        ({"root": "oci:/home/me/image.tar"}, {TEMPORARY}),
        ({"backend": "oci:/home/me/crun"}, {TEMPORARY}),
        ({"root": "host"}, set()),
        (shows("/"), set()),
        (shows("/run"), {TEMPORARY}),
        (shows("/var"), {HOMES}),
        (shows("/usr/../tmp/x"), {HOMES}),
        (shows("/homework"), {HOMES, TEMPORARY}),
    ],
    ids=str,
)
def test_a_unit_hides_nothing_that_its_policy_shows(changes: dict[str, Any], hidden: set[str]) -> None:
    assert hides(replace(nsjail_py.policy("moderate"), **changes)) == hidden


@pytest.mark.usefixtures("elsewhere")
def test_a_unit_hides_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    moderate = nsjail_py.policy("moderate")
    (tmp_path / "link").symlink_to("/root/data")
    assert hides(replace(moderate, **shows(str(tmp_path / "link")))) == set()
    assert hides(moderate, read_from=[tmp_path / "link"]) == set()


@pytest.mark.usefixtures("elsewhere")
def test_a_unit_hides_no_file_that_its_policy_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unitfile, "HOMES", (str(tmp_path / "home"),))
    for name, extended in {"etc": "../home/mine.toml", "home": "../srv/ours.toml", "srv": "moderate"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / {"etc": "p.toml", "home": "mine.toml", "srv": "ours.toml"}[name]).write_text(f'extends = "{extended}"\n')
    (tmp_path / "units").mkdir()
    for policy, is_hidden in {"etc/p.toml": False, "srv/ours.toml": True}.items():
        (file,) = written(tmp_path / "units", str(tmp_path / policy), "--", "/bin/cat")
        assert (HOMES in file.read_text().splitlines()) == is_hidden


def test_a_program_is_the_one_that_the_command_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit begins in the root directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.toml").write_text('extends = "moderate"\nroot = "oci:/srv/image.tar"\n')
    (tmp_path / "units").mkdir()
    for policy, program, meant in (
        ("moderate", "./prog", str(tmp_path / "prog")),
        ("moderate", "sort", "sort"),
        ("./image.toml", "bin/prog", "bin/prog"),
    ):
        (file,) = written(tmp_path / "units", policy, "--", program, "./x")
        assert f" -- {meant} ./x\n" in file.read_text()


@pytest.mark.parametrize("user", ["root", "0"])
def test_root_as_the_user_of_a_unit_is_root_as_without(user: str) -> None:
    arguments = (nsjail_py.policy("untrusted"), "untrusted", ["/bin/cat"], "jail")
    assert unitfile.unit(*arguments, user=user) == unitfile.unit(*arguments)


# ---------------------------------------------------------------- real units

LACK = f"doctor: {hostinfo.systemd_lack()}" if hostinfo.systemd_lack() else "" if IS_ROOT else "only root commands the system's manager"
real = pytest.mark.skipif(bool(LACK), reason=LACK)
LOCKS = ("RuntimeDirectory=nsjail_py", "RuntimeDirectoryPreserve=yes")
UNITS = Path("/run/systemd/system")
NO_USER = LACK or "nobody has an account here to command a manager of his own"
RUN = """
import nsjail_py
try:
    result = nsjail_py.run(["/bin/true"])
    print(result.summary, result.mode, result.memory_source)
    print(*(f"{one.name}: {one.reason}" for one in result.protections if one.state == "unavailable"), sep="\\n")
except nsjail_py.JailError as error:
    print(error)
"""
USER = next((entry.pw_name for entry in pwd.getpwall() if 1000 <= entry.pw_uid < 60000), "")


def in_unit(*settings: str, code: Iterable[str] = ("-c", RUN)) -> subprocess.CompletedProcess[str]:
    properties = [word for setting in settings for word in ("-p", setting)]
    command = ["systemd-run", "--wait", "--pipe", "--quiet", "--collect", *properties, "--", sys.executable, *code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@real
def test_the_launcher_alone_has_its_control_groups_in_a_unit_that_is_not_delegated() -> None:
    """What test_alone.py and test_saved.py promise of them, which a run in a delegated unit leaves out."""
    tests = "-m pytest -q -p no:cacheprovider -m elsewhere tests/test_alone.py tests/test_saved.py"
    done = in_unit(f"WorkingDirectory={Path(__file__).parent.parent}", code=tests.split())
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout


CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
CRASHES = "import os, resource\ntry: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nexcept (OSError, ValueError): pass\nos.abort()"


@pytest.fixture
def core_helper(place: Path) -> Iterator[Path]:
    """A program that the kernel starts for core dumps, as systemd-coredump is; and what is there once it was started."""
    started, helper, before = place / "started", place / "helper", CORE_PATTERN.read_text()
    helper.write_text(f"#!/bin/sh\n: >{started}\n")
    helper.chmod(0o755)
    CORE_PATTERN.write_text(f"|{helper}")
    yield started
    CORE_PATTERN.write_text(before)


@real
def test_a_crash_inside_starts_no_program_of_the_hosts(core_helper: Path) -> None:
    """It would be root's, in no jail, and fed by the program. A resource limit of 0 does not keep the kernel from it."""

    def started(seconds: float) -> bool:
        deadline = time.monotonic() + seconds * PATIENCE
        while not core_helper.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return core_helper.exists()

    for policy in ("untrusted", "moderate"):
        assert nsjail_py.run_python(CRASHES, policy=policy).signal == signal.SIGABRT
        with nsjail_py.Jail(policy, preload=[]) as jail:
            assert jail.run_python(CRASHES).signal == signal.SIGABRT
    assert not started(1)
    subprocess.run([sys.executable, "-c", CRASHES], stderr=subprocess.DEVNULL, check=False)
    assert started(10), "outside it is"


@real
@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["PrivateUsers=yes"], "PrivateUsers=no"),
        (["ProtectSystem=strict"], "RuntimeDirectory=nsjail_py"),
        (
            [*LOCKS, "ProtectSystem=strict", "Environment=NSJAIL_PY_CACHE=/var/cache/not-there"],
            "cache directory: Read-only file system (/var/cache/not-there); set NSJAIL_PY_CACHE to a directory of your own, or in a "
            "systemd unit CacheDirectory=nsjail_py (nsjail_py-USER with User=)",
        ),
        (["SystemCallFilter=@system-service"], "`nsjail-py systemd unit`"),
        (["SystemCallFilter=@system-service", "SystemCallErrorNumber=EPERM"], "`nsjail-py systemd unit`"),
        (["ProtectHostname=yes"], "ProtectHostname=no"),
        (["RestrictNamespaces=yes"], "RestrictNamespaces=no"),
        (["ProtectControlGroups=yes"], "ProtectControlGroups=no"),
        pytest.param([f"User={USER}", "ProtectHome=yes"], "CacheDirectory=nsjail_py", marks=pytest.mark.skipif(not USER, reason=NO_USER)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_forbids_something_is_named(settings: list[str], remedy: str) -> None:
    assert remedy in in_unit(*settings).stdout


@real
@pytest.mark.parametrize(
    "settings",
    [
        ["Delegate=yes"],
        ["NoNewPrivileges=yes"],
        [*LOCKS, "ProtectSystem=strict", "CacheDirectory=nsjail_py"],
        ["SystemCallFilter=@system-service", f"SystemCallFilter={unitfile.CALLS}"],
        ["ProtectHome=yes", "PrivateTmp=yes", "PrivateDevices=yes", "PrivateNetwork=yes"],
        ["ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectClock=yes", "MemoryDenyWriteExecute=yes"],
        ["ProtectProc=invisible", "RestrictAddressFamilies=AF_UNIX", "SystemCallArchitectures=native", "LockPersonality=yes"],
        ["RestrictSUIDSGID=yes"],  # openat2 seems not to exist
        ["PrivateIPC=yes", "RestrictRealtime=yes"],
    ],
    ids=lambda value: " ".join(value),
)
def test_a_jail_runs_under_the_rest(settings: list[str]) -> None:
    assert in_unit(*settings).stdout.startswith("ok: the program exited with 0 root cgroup2")


@real
@pytest.mark.parametrize("setting", ["ProtectKernelTunables=yes", "ProcSubset=pid"])
def test_a_jail_runs_with_one_wall_less_and_says_so(setting: str) -> None:
    said = in_unit(setting).stdout
    assert said.startswith("ok: the program exited with 0 root cgroup2") and "\nnested_userns: " in said, said


@real
@pytest.mark.parametrize(("delegate", "got"), [("yes", "delegated cgroup2"), ("no", "rootless rusage")])
def test_a_jail_runs_as_a_dynamic_user(delegate: str, got: str) -> None:
    name = f"nsjail-test-{secrets.token_hex(4)}"
    said = in_unit("DynamicUser=yes", f"User={name}", f"CacheDirectory={name}", f"Delegate={delegate}").stdout
    shutil.rmtree(f"/var/cache/private/{name}")
    os.unlink(f"/var/cache/{name}")
    assert said.startswith(f"ok: the program exited with 0 {got}")


BELOW = """
import os
from pathlib import Path
unit = Path("/sys/fs/cgroup" + open("/proc/self/cgroup").read().split("::")[1].strip())
if unit.suffix:
    (unit / "mine").mkdir()
    (unit / "mine/cgroup.procs").write_text(str(os.getpid()))
else:
    unit = unit.parent
"""
WHERE = (
    "\nfrom nsjail_py import launcher\nclaim = launcher.current().claim\nprint(claim.directories['unified'].parent == unit, claim.reason)"
)


def systemd_version() -> int:
    """0: none runs here."""
    said = "" if LACK else subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout
    return int(found[1]) if (found := re.match(r"systemd (\d+)", said)) else 0


@real
@pytest.mark.parametrize(
    "below",
    [
        "by hand",
        pytest.param("DelegateSubgroup=mine", marks=pytest.mark.elsewhere(0 < systemd_version() < 254, why="it came with systemd 254")),
    ],
)
@pytest.mark.parametrize(
    ("user", "mode"),
    [("root", "root"), pytest.param(USER, "delegated", marks=pytest.mark.skipif(not USER, reason=NO_USER))],
    ids=["root", "user"],
)
def test_jails_are_inside_of_a_delegated_unit_also_when_its_processes_are_below_it(below: str, user: str, mode: str) -> None:
    settings = ["Delegate=yes", f"User={user}", *([below] if "=" in below else [])]
    done = in_unit(*settings, code=("-c", BELOW + RUN + WHERE))
    assert done.stdout.startswith(f"ok: the program exited with 0 {mode} cgroup2"), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].rstrip() == "True"


@real
def test_jails_outside_of_a_units_limits_are_told_also_when_its_processes_are_below_it() -> None:
    lines = in_unit("Delegate=no", code=("-c", BELOW + RUN + WHERE)).stdout.splitlines()
    assert lines[-1].startswith("False jails are outside of the limits of run-") and lines[-1].endswith("Delegate=yes in the unit")


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Writes a unit for a program, and takes it away again."""
    made: list[Path] = []

    def install(*words: str) -> str:
        name = f"nsjail-test-{secrets.token_hex(4)}"
        to = tmp_path / name
        to.mkdir()
        for file in written(to, "--name", name, *words):
            made.append(UNITS / file.name)
            shutil.copy(file, UNITS)
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        return name

    yield install
    for file in made:
        subprocess.run(["systemctl", "stop", file.name.replace("@", "@*")], check=False, capture_output=True)
        file.unlink()
    subprocess.run(["systemctl", "daemon-reload"], check=True)


def shown(unit: str, what: str) -> str:
    command = ["systemctl", "show", "-p", what, "--value", unit]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def journal_of(unit: str, **fields: str) -> list[dict[str, str]]:
    """The entries that have these fields. journald takes a moment."""
    matches = [f"{name}={value}" for name, value in fields.items()]
    deadline = time.monotonic() + 5 * PATIENCE
    while time.monotonic() < deadline:
        command = ["journalctl", "--quiet", "--output=json", f"_SYSTEMD_UNIT={unit}", *matches]
        if lines := subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            return [json.loads(line) for line in lines]
        time.sleep(0.2)
    return []


@real
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ([], "root"),
        (["--user", "root"], "root"),
        pytest.param(["--user", USER], "delegated", marks=pytest.mark.skipif(not USER, reason=NO_USER)),
    ],
    ids=["root", "root by name", "user"],
)
def test_a_written_unit_runs_its_program_in_a_jail_and_the_journal_says_how_it_went(
    options: list[str], mode: str, installed: Callable[..., str]
) -> None:
    name = installed(*options, "moderate", "--", "/bin/sh", "-c", "echo out of $(id -u) >&2; exit 3")
    subprocess.run(["systemctl", "start", "--wait", name], check=False)
    entries = journal_of(f"{name}.service", NSJAIL_VERDICT="exit")
    assert entries, subprocess.run(["journalctl", "--quiet", "--unit", name], capture_output=True, text=True, check=True).stdout
    (entry,) = entries
    assert (entry["NSJAIL_EXIT_CODE"], entry["NSJAIL_POLICY"], entry["NSJAIL_MODE"]) == ("3", "moderate", mode)
    assert entry["NSJAIL_MEMORY_SOURCE"] == "cgroup2"
    assert shown(name, "ExecMainStatus") == "3"


@real
def test_a_unit_of_trusted_reads_a_file_in_a_home(installed: Callable[..., str]) -> None:
    with tempfile.TemporaryDirectory(dir="/home") as home:
        os.chmod(home, 0o755)
        (Path(home) / "status").write_text("exit 7\n")
        name = installed("trusted", "--", "/bin/sh", f"{home}/status")
        subprocess.run(["systemctl", "start", "--wait", name], check=False)
        assert journal_of(f"{name}.service", NSJAIL_EXIT_CODE="7")


@real
def test_a_program_that_uses_up_its_share_leaves_nsjail_py_enough_to_end_it(installed: Callable[..., str], tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text('extends = "moderate"\n[limits]\ncpus = 0.2\ncpuset = "0"\nwall_time = "2s"\n')
    name = installed(str(policy), "--", "/bin/sh", "-c", "while :; do :; done & while :; do :; done")
    subprocess.run(["systemctl", "start", "--wait", name], check=False)
    (entry,) = journal_of(f"{name}.service", NSJAIL_VERDICT="wall_time")
    assert int(entry["NSJAIL_WALL_USEC"]) < 2e6 + 1e6 * PATIENCE
    assert int(entry["NSJAIL_CPU_USEC"]) < 0.2 * int(entry["NSJAIL_WALL_USEC"]) + 0.2e6


@real
def test_a_connection_to_the_socket_is_a_run(installed: Callable[..., str], tmp_path: Path) -> None:
    address = tmp_path / "jail.sock"
    name = installed("--listen", str(address), "untrusted", "--", "/usr/bin/sort")
    subprocess.run(["systemctl", "start", f"{name}.socket"], check=True)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(address))
            client.sendall(b"b\na\n")
            client.shutdown(socket.SHUT_WR)
            client.settimeout(30 * PATIENCE)
            assert client.makefile("rb").read() == b"a\nb\n"


@real
def test_a_connection_whose_program_fails_leaves_no_unit(installed: Callable[..., str], tmp_path: Path) -> None:
    address = tmp_path / "jail.sock"
    name = installed("--listen", str(address), "moderate", "--", "/bin/sh", "-c", "echo; exit 3")
    subprocess.run(["systemctl", "start", f"{name}.socket"], check=True)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(address))
        client.settimeout(30 * PATIENCE)
        assert client.makefile("rb").read() == b"\n"

    def units() -> list[str]:
        command = ["systemctl", "list-units", "--all", "--plain", "--no-legend", f"{name}@*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert gone(units)


def processes_of(unit: str) -> list[str]:
    group = shown(unit, "ControlGroup")
    top = Path(f"/sys/fs/cgroup{group}")
    return [pid for place, _, _ in os.walk(top) for pid in (Path(place) / "cgroup.procs").read_text().split()] if group else []


STUBBORN = "trap '' TERM INT HUP; while true; do sleep 1000; done"
RESIDENT = """
import sys, time
from nsjail_py import Jail, systemd
with systemd.Resident():
    runs = [Jail("moderate", wall_time=None).start(["/bin/sh", "-c", sys.argv[1]]) for _ in range(3)]
    print("started", [run.pid for run in runs], file=sys.stderr, flush=True)
    time.sleep(1000)
"""


@real
def test_stop_is_the_end_of_a_jail_within_a_second(installed: Callable[..., str]) -> None:
    name = installed("moderate", "--", "/bin/sh", "-c", STUBBORN)
    subprocess.run(["systemctl", "start", name], check=True)
    deadline = time.monotonic() + 30 * PATIENCE
    while len(processes_of(name)) < 4 and time.monotonic() < deadline:  # nsjail-py, its launcher, init, the program
        time.sleep(0.1)
    time.sleep(0.3 * PATIENCE)
    pids = processes_of(name)
    assert len(pids) >= 4
    began = time.monotonic()
    subprocess.run(["systemctl", "stop", name], check=True)
    assert time.monotonic() - began < 1.0 * PATIENCE
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert shown(name, "Result") == "success"


@real
def test_a_resident_service_is_ready_fed_and_gone_within_a_second(tmp_path: Path) -> None:
    name = f"nsjail-test-resident-{os.getpid()}"
    ended = f"ExecStopPost=/bin/sh -c 'echo $$SERVICE_RESULT $$EXIT_CODE $$EXIT_STATUS >{tmp_path}/ended'"
    properties = ["Type=notify", "WatchdogSec=20", "Delegate=yes", "NotifyAccess=main", "KillMode=mixed", ended]
    command = ["systemd-run", "--quiet", "--collect", f"--unit={name}", *(word for one in properties for word in ("-p", one))]
    subprocess.run([*command, "--", sys.executable, "-c", RESIDENT, STUBBORN], check=True)  # returns when READY=1 was said
    try:
        assert subprocess.run(["systemctl", "is-active", "--quiet", name], check=False).returncode == 0
        deadline = time.monotonic() + 30 * PATIENCE
        while len(processes_of(name)) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = processes_of(name)
        assert len(pids) >= 8
    finally:
        began = time.monotonic()
        subprocess.run(["systemctl", "stop", name], check=True)
    assert time.monotonic() - began < 1.0 * PATIENCE
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert (tmp_path / "ended").read_text() == "success exited 0\n"


# ---------------------------------------------------------------- a scope asked of a user's manager


@pytest.fixture(scope="module")
def manager() -> Iterator[list[str]]:
    """What stands before a command of a user who has a manager, and is in a group of root's. One manager for all: it takes a while to go."""
    user = pwd.getpwnam(USER)
    lingered = Path(f"/var/lib/systemd/linger/{USER}").exists()
    subprocess.run(["loginctl", "enable-linger", USER], check=True)
    deadline = time.monotonic() + 30 * PATIENCE
    place = Path(f"/run/user/{user.pw_uid}")
    while not ((place / "bus").exists() and (place / "systemd/private").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    yield ["setpriv", f"--reuid={USER}", f"--regid={user.pw_gid}", "--init-groups", "--reset-env"]
    if not lingered:
        subprocess.run(["loginctl", "disable-linger", USER], check=True)


def scopes() -> list[str]:
    return [place for place, _, _ in os.walk("/sys/fs/cgroup/user.slice") if Path(place).name.startswith("nsjail_py-")]


def gone(what: Callable[[], list[str]]) -> bool:
    deadline = time.monotonic() + 5 * PATIENCE
    while what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not what()


@real
@pytest.mark.skipif(not USER, reason=NO_USER)
def test_a_users_manager_gives_the_launcher_a_scope_and_nothing_else_moves(manager: list[str]) -> None:
    code = "before = open('/proc/self/cgroup').read()\n" + RUN + "assert before == open('/proc/self/cgroup').read()\n"
    done = subprocess.run([*manager, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ok: the program exited with 0 delegated cgroup2")
    assert gone(scopes)


@real
@pytest.mark.skipif(not USER, reason=NO_USER)
@pytest.mark.parametrize(("delegate", "group"), [("yes", "nsjail-test-unit"), ("no", "nsjail_py-")])
def test_a_unit_of_a_users_is_used_when_it_was_handed_over_and_else_left_alone(delegate: str, group: str, manager: list[str]) -> None:
    code = RUN + "from nsjail_py import launcher; print(launcher.current().claim.directories['unified'].parent.name)"
    bus = ["env", f"XDG_RUNTIME_DIR=/run/user/{pwd.getpwnam(USER).pw_uid}"]
    unit = [
        "systemd-run",
        "--user",
        "--wait",
        "--pipe",
        "--quiet",
        "--collect",
        "--unit=nsjail-test-unit",
        "-p",
        f"Delegate={delegate}",
        "--",
    ]
    done = subprocess.run([*manager, *bus, *unit, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ok: the program exited with 0 delegated cgroup2"), done.stderr
    assert done.stdout.splitlines()[-1].startswith(group)


@real
@pytest.mark.skipif(not USER, reason=NO_USER)
def test_a_killed_caller_leaves_no_scope(manager: list[str]) -> None:
    code = "import os; from nsjail_py import Jail; run = Jail('moderate').start(['/bin/sleep', '99']); run.pid; os.kill(os.getpid(), 9)"
    assert subprocess.run([*manager, sys.executable, "-c", code], check=False).returncode == -9
    assert gone(scopes)


@real
@pytest.mark.skipif(not USER, reason=NO_USER)
def test_a_bus_that_refuses_is_named_and_an_error_where_the_policy_demands_a_group(manager: list[str]) -> None:
    """The bus of a manager that has been stopped is a socket that nobody answers."""
    uid = pwd.getpwnam(USER).pw_uid
    strict = "import nsjail_py\ntry: nsjail_py.run(['/bin/true'], best_effort=('own_uid', 'groups', 'swap', 'landlock_net', 'landlock_scope'))\nexcept nsjail_py.Unavailable as error: print('strict:', error)"
    script = f'mount --bind /dev/null /run/user/{uid}/bus && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *manager, sys.executable, "-c", RUN + strict]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("ok: the program exited with 0 rootless rusage")
    assert "the user manager refuses one" in said
    assert "strict: protections (cgroup: our control group" in said


# ---------------------------------------------------------------- a group that somebody gave away by hand


@pytest.fixture
def bare() -> Iterator[tuple[Path, list[str]]]:
    """A group that belongs to a user, as `mkdir` and `chown` make it, and what stands before a command of his in it."""
    user = pwd.getpwnam(USER)
    group = Path(f"/sys/fs/cgroup/nsjail-test-{os.getpid()}")
    group.mkdir()
    for file in (group, group / "cgroup.procs", group / "cgroup.subtree_control", group / "cgroup.threads"):
        os.chown(file, user.pw_uid, user.pw_gid)
    become = f'exec setpriv --reuid={USER} --regid={user.pw_gid} --init-groups --reset-env "$@"'
    yield (
        group,
        ["sh", "-c", f"test -d {group}/main && echo $$ >{group}/main/cgroup.procs || echo $$ >{group}/cgroup.procs; {become}", "sh"],
    )
    (group / "cgroup.kill").write_text("1")
    for _ in range(500):
        with contextlib.suppress(OSError):
            for place, _, _ in list(os.walk(group, topdown=False)):
                os.rmdir(place)
            break
        time.sleep(0.01)


def below(group: Path) -> list[str]:
    return [Path(place).name for place, _, _ in os.walk(group) if Path(place).name.startswith("nsjail_py.")]


@real
@pytest.mark.skipif(not USER, reason=NO_USER)
def test_a_bare_group_of_a_users_is_used_and_what_a_crash_left_in_it_is_removed(bare: tuple[Path, list[str]]) -> None:
    group, enter = bare
    said = subprocess.run([*enter, sys.executable, "-c", RUN], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ok: the program exited with 0 delegated cgroup2")
    assert not below(group)
    crash = (
        "import os; from nsjail_py import Jail, launcher; run = Jail('moderate').start(['/bin/sleep', '99']); run.pid\n"
        "os.kill(launcher.current().pid, 9); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([*enter, sys.executable, "-c", crash], check=False).returncode == -9
    assert below(group)
    said = subprocess.run([*enter, sys.executable, "-c", RUN], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ok: the program exited with 0 delegated cgroup2")
    assert not below(group)


@real
@pytest.mark.skipif(not USER, reason=NO_USER)
def test_a_bare_group_with_a_stranger_in_it_is_not_used_and_the_stranger_stays(bare: tuple[Path, list[str]]) -> None:
    group, enter = bare
    stranger = subprocess.Popen([*enter, "sleep", "999"])
    while str(stranger.pid) not in (group / "cgroup.procs").read_text().split():
        time.sleep(0.05)
    where = "print(*nsjail_py.launcher.current().claim.directories.values())"  # none, or in a scope of his manager's, if that runs
    code = f"import os\nif os.fork(): os.wait(); os._exit(0)\n{RUN}{where}"
    try:
        said = subprocess.run([*enter, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.startswith("ok: the program exited with 0") and group.name not in said.splitlines()[-1], said
        assert str(stranger.pid) in (group / "cgroup.procs").read_text().split()
    finally:
        stranger.kill()
        stranger.wait()
