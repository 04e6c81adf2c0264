"""What a run came to is said by us and not by the program; and what it leaves is touched by nobody without looking."""

from __future__ import annotations

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE, ROOT

import nsjail_py
from nsjail_py import PIPE, Jail, Verdict, launcher

from .runner import EVERY_WALL, WALLS, Attack, held, inside, outside, processes_with, run_python, with_starts

LEVELS = ("untrusted", "moderate", "trusted")


@pytest.mark.parametrize("code", [1, 2, 77, 124, 125, 126, 127, 128, 137, 139, 255])
@pytest.mark.parametrize("level", with_starts(LEVELS))
def test_an_exit_status_of_its_own_is_never_taken_for_ours(code: int, level: str) -> None:
    result = run_python(f"import os; os._exit({code})", level)
    assert (result.verdict, result.exit_code, result.signal, result.evidence) == (Verdict.exit, code, None, {"exit_code": code})


@pytest.mark.parametrize("code", [256, 512, -1, 1 << 31])
def test_an_exit_status_is_what_the_kernel_keeps_of_it(code: int) -> None:
    alone = subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL(None)._exit({code})"], check=False).returncode
    result = nsjail_py.run_python(f"import ctypes; ctypes.CDLL(None)._exit({code})")
    assert result.exit_code == alone


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 34, 64])
@pytest.mark.parametrize("level", with_starts(LEVELS))
def test_a_signal_that_it_sends_itself_is_the_programs_end(number: int, level: str) -> None:
    """abort is seen as abort: it is not process 1, which would ignore all of these."""
    source = f"import os, signal\ntry: signal.signal({number}, signal.SIG_DFL)\nexcept OSError: pass\nos.kill(os.getpid(), {number})"
    result = run_python(source, level)
    assert (result.verdict, result.signal, result.exit_code) == (Verdict.signal, number, None)


SCRIBBLE = """
for fd in range(3, 1100):
    for message in (bytes(8), bytes(88), b'\\x06' + bytes(87), b'\\xff' * 2000):
        try: os.write(fd, message); won(fd)
        except OSError: pass
    try: socket.socket(fileno=os.dup(fd)).send(bytes(88)); won(fd)
    except OSError: pass
for pid in os.listdir('/proc'):
    if pid.isdigit() and int(pid) != os.getpid() and not T.get('outside'):
        try:
            for fd in os.listdir(f'/proc/{pid}/fd'): won((pid, fd))
        except OSError: pass
"""


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_descriptor_leads_to_the_report(wall: str) -> None:
    """The sockets and the pipe on which its end is told are closed before its first instruction."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    outside(Attack("", SCRIBBLE), {"outside": True}, close_fds=False)
    os.close(write)
    os.close(read)
    result = inside(Attack("", SCRIBBLE + "\nos._exit(3)"), wall)
    assert (result.verdict, result.exit_code) == (Verdict.exit, 3) and b"WON" not in result.stdout


def test_what_looks_like_a_report_on_its_output_is_output() -> None:
    forged = b"\x03\x00\x00\x00" + bytes(200) + b'{"verdict": "ok"}\n{"exit_code": 0}\n'
    result = nsjail_py.run_python(f"import os; os.write(1, {forged!r}); os.write(2, {forged!r}); os._exit(4)")
    assert (result.verdict, result.exit_code, result.stdout, result.stderr) == (Verdict.exit, 4, forged, forged)


@pytest.mark.parametrize("code", [0, 5])
def test_the_run_ends_with_the_main_process_whoever_holds_its_output(code: int) -> None:
    """Outside, a grandchild keeps the reader of a pipe waiting."""
    hold = f"import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1.5)\n  os._exit(0)\nos.wait()\nos._exit({code})"
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", hold], stdout=subprocess.PIPE, check=False)
    assert time.monotonic() - begin > 1.4
    result = nsjail_py.run_python(hold.replace("1.5", "30"), policy="moderate")
    assert result.wall_time < 2 and result.exit_code == code


def test_a_child_that_is_init_s_own_does_not_end_the_run() -> None:
    """CLONE_PARENT makes a sibling; orphans come to init. Neither's end is the program's."""
    source = "import ctypes, os, time\nl = ctypes.CDLL(None)\nfor flags in (0x8000 | 17, 17, 0x8000 | 9):\n  if l.syscall(56, flags, 0, 0, 0, 0) == 0: os._exit(99)\nif os.fork() == 0:\n  os.fork()\n  os._exit(98)\ntime.sleep(0.2)\nos._exit(6)"
    for level in ("moderate", "trusted"):
        result = nsjail_py.run_python(source, policy=level)
        assert (result.verdict, result.exit_code) == (Verdict.exit, 6)


def test_what_was_killed_inside_does_not_hide_what_it_used() -> None:
    source = "import os, time\nif os.fork() == 0:\n  e = time.process_time() + 0.3\n  while time.process_time() < e: pass\n  os.kill(os.getpid(), 9)\nos.wait()"
    assert nsjail_py.run_python(source, policy="moderate").cpu_time >= 0.3


def test_a_failure_of_ours_is_an_exception_and_a_failure_of_exec_is_no_exit_status() -> None:
    with tempfile.TemporaryDirectory(prefix="canary-") as top:
        Path(top).chmod(0o755)
        script = Path(top, "script")
        script.write_text("#!/nonexistent/interpreter\n")
        script.chmod(0o755)
        alone = subprocess.run(["sh", "-c", str(script)], capture_output=True, check=False).returncode
        assert alone in (126, 127)
        result = nsjail_py.run([str(script)], policy="trusted", mounts=[nsjail_py.Mount(source=top, target="/data")])
        assert result.verdict is Verdict.exec_failed and result.exit_code is None
        with pytest.raises(nsjail_py.SetupError):
            nsjail_py.run(
                ["/bin/true"], policy="moderate", root="system", mounts=[nsjail_py.Mount(source=top, target="/usr/share/nowhere")]
            )


def test_memory_that_ran_out_in_a_child_is_named_though_the_program_went_on() -> None:
    source = "import os\nif os.fork() == 0:\n  x = bytearray(300 << 20)\n  os._exit(0)\nprint(os.wait()[1] != 0)"
    result = nsjail_py.run_python(source, policy="moderate", memory="64M")
    assert result.verdict is Verdict.memory if result.oom_events else b"True" in result.stdout


# What it leaves in a directory of the host.


@pytest.fixture
def workdir() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="canary-work-"))
    top.chmod(0o755)
    yield top
    subprocess.run(["chmod", "-R", "u+rwX", str(top)], check=False)
    subprocess.run(["rm", "-rf", str(top)], check=True)


LEAVE = {
    "links to files of the host": "os.symlink(T['secret'], 'l1'); os.symlink('/proc/self/root/etc/passwd', 'l2'); os.symlink('.', 'l3'); os.symlink('l4', 'l4')",
    "pipes": "os.mkfifo('p1'); os.mkfifo('main.py'); os.mkfifo('sitecustomize.py')",
    "sparse giants": "os.truncate(os.open('giant', os.O_CREAT | os.O_RDWR), 1 << 42)",
    "odd names": "for n in list(range(1, 47)) + list(range(48, 256)): open(bytes([n]) * 40 + b'\\n\\xff', 'w')",
    "directories without permission": "for n in range(20): os.mkdir(f'd{n}'); open(f'd{n}/f', 'w'); os.chmod(f'd{n}', 0)",
    "deep trees": "for _ in range(200): os.mkdir('d' * 100); os.chdir('d' * 100)",
    "a directory that nobody may enter": "os.chmod('.', 0)",
}  # fmt: skip


@pytest.mark.parametrize("what", LEAVE)
def test_what_it_left_in_a_work_directory_neither_stops_nor_leads_the_next_run(what: str, workdir: Path, secret: Path) -> None:
    before = secret.stat()
    assert b"DONE" in inside(Attack("", LEAVE[what]), "moderate", {"secret": str(secret)}, workdir=str(workdir)).stdout
    if what == "a directory that nobody may enter":
        workdir.chmod(0o755)
    again = inside(Attack("", "os.umask(0)\nopen('again', 'w').write('x')"), "moderate", workdir=str(workdir), wall_time=10.0)
    assert b"DONE" in again.stdout and (workdir / "again").read_text() == "x"
    after = secret.stat()
    assert (before.st_mode, before.st_uid, before.st_size, before.st_ino) == (after.st_mode, after.st_uid, after.st_size, after.st_ino)


@pytest.mark.parametrize("wall", ["untrusted", "moderate"])
def test_nothing_with_a_right_of_its_own_is_left_in_a_work_directory(wall: str, workdir: Path) -> None:
    """No device, no set-user-id or set-group-id file, by none of the calls that make or change one."""
    ways = "\n".join(
        f"try: {way}\nexcept OSError: pass"
        for way in (
            "open('f', 'w'); os.chmod('f', 0o4755)",
            "os.chmod('f', 0o2755)",
            "os.fchmod(os.open('f', os.O_RDWR), 0o6755)",
            "os.open('g', os.O_CREAT | os.O_RDWR, 0o4755)",
            "call(85, b'h', 0o4755)",
            "os.mknod('i', 0o104755)",
            "os.chmod('f', 0o4755, follow_symlinks=False)",
            "call(452, -100, b'f', 0o4755, 0)",
            "os.mknod('null', 0o020666, os.makedev(1, 3))",
            "os.mknod('white', 0o020666, 0)",
            "os.mknod('disk', 0o060666, os.makedev(8, 0))",
            "os.setxattr('f', 'security.capability', bytes.fromhex('0100000200200000000000000000000000000000'))",
        )
    )
    outside(Attack("", f"os.chdir({str(workdir)!r})\nos.umask(0)\n{ways}\nif os.stat('f').st_mode & 0o6000: won()"))
    for left in workdir.iterdir():
        left.unlink()
    held(inside(Attack("", "os.umask(0)\n" + ways), wall, workdir=str(workdir)))
    modes = {path.name: path.lstat().st_mode for path in workdir.iterdir()}
    assert "f" in modes and not [name for name, mode in modes.items() if mode & 0o6000 or not stat.S_ISREG(mode)]
    assert all("security.capability" not in os.listxattr(workdir / name) for name in modes)


def test_a_work_directory_is_never_roots_when_it_comes_back(workdir: Path) -> None:
    inside(Attack("", "open('f', 'w')"), "moderate", workdir=str(workdir))
    assert (workdir / "f").stat().st_uid != 0


WAYS_IN = """
import os
for way in (os.listdir, os.rmdir):
    try: print(way('/shown/kept'))
    except OSError as error: print(error.errno)
"""


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user's runs have his own id")
@pytest.mark.parametrize("wall", ["untrusted", "trusted"])
def test_what_one_run_keeps_for_itself_no_other_run_reads_or_changes(wall: str, workdir: Path) -> None:
    """Where the directory is seen: through one above it that a policy shows. The kernel lets an owner in, so no run may have its owner's id."""
    kept = workdir / "kept"
    kept.mkdir(mode=0o700)
    launcher.shutdown()  # the next one gives the first of its ids
    nsjail_py.run_python("import os; os.umask(0o77); open('f', 'w').write('s')", policy="moderate", workdir=str(kept)).check()
    assert kept.stat().st_uid not in range(launcher.UID_BASE, launcher.UID_BASE + launcher.UID_BLOCK * launcher.UID_BLOCKS)
    for writable in (False, True):
        shown = nsjail_py.Mount(source=str(workdir), target="/shown", writable=writable)
        found = nsjail_py.run_python(WAYS_IN, policy=wall, mounts=[shown])
        assert found.check().stdout.split()[0] == str(errno.EACCES).encode(), found
    nsjail_py.run_python("assert open('f').read() == 's'", policy="moderate", workdir=str(kept)).check()


def test_no_name_of_ours_lies_in_a_shared_directory_while_it_runs() -> None:
    """Nothing of the jail's making can be guessed, exchanged or linked to. Others may make such names meanwhile, but not at each try."""

    def names() -> set[str]:
        return {f"{place}/{name}" for place in ("/tmp", "/var/tmp", "/dev/shm") for name in os.listdir(place) if "jail" in name}

    def made() -> set[str]:
        before = names()
        with Jail("untrusted").start_python("input()", stdin=PIPE) as process:
            assert process.pid
            return names() - before

    assert not all(made() for _ in range(5))


def test_nothing_that_a_program_wrote_is_evaluated() -> None:
    """No module of ours unpickles, evaluates or executes, on anybody's word outside a jail."""
    risky = {"pickle", "marshal", "shelve", "eval", "exec", "literal_eval", "yaml"}
    for path in (ROOT / "nsjail_py").glob("*.py"):
        if path.stem.endswith("_inside"):
            continue  # their text runs in the jail
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [node.func.id]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not risky & set(names), (path.name, names)


def test_a_closed_stdout_neither_ends_nor_frees_a_run() -> None:
    with Jail("moderate", wall_time=0.5).start_python(
        "import os, time\nfor fd in (0, 1, 2): os.close(fd)\ntime.sleep(30)", stdout=PIPE
    ) as process:
        assert process.stdout and process.stdout.read() == b""
        assert process.poll() is None
        assert process.wait().verdict is Verdict.wall_time


def test_a_kill_reaches_what_hides() -> None:
    marker = f"hide-{time.monotonic_ns()}"
    source = "import os, signal, time\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nfor _ in range(5):\n  if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    os.kill(os.getpid(), signal.SIGSTOP)\nprint('up', flush=True)\ntime.sleep(30)"
    with Jail(WALLS["moderate"]).start_python(source, args=[marker], stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        time.sleep(0.2)  # they change their numbers while they hide
        assert len(processes_with(marker)) > 1
        process.kill()
        assert process.wait().verdict is Verdict.killed
    assert not processes_with(marker)


@pytest.mark.parametrize("limit", ["wall_time", "idle_time"])
def test_what_ended_in_time_is_no_timeout_however_late_the_launcher_hears_of_it(limit: str, tmp_path: Path) -> None:
    """It is told last when init has ended, where something of the host's is shown; and it may be busy. Here it is stopped."""
    pid = launcher.current().pid
    jail = Jail("untrusted", mounts=[nsjail_py.Mount(source=str(tmp_path), target="/data")], **{limit: 1.0 * PATIENCE})
    with jail.start(["/bin/sleep", str(0.3 * PATIENCE)]) as process:
        assert process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(1.5 * PATIENCE)
        finally:
            os.kill(pid, signal.SIGCONT)
        result = process.wait()
    assert result.ok and result.wall_time < 1.0 * PATIENCE, result.summary
