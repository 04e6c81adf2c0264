"""Attacks that have won here once. Each is held now, at the levels that it is tried at."""

from __future__ import annotations

import os
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE
from msgspec.structs import replace

import nsjail_py
from nsjail_py import Verdict, compiled

from .runner import LEVELS, WALLS, Attack, held, inside, outside, with_starts


@pytest.fixture
def given() -> Iterator[Path]:
    """A file of the caller's."""
    with tempfile.TemporaryDirectory(prefix="canary-") as top:
        os.chmod(top, 0o755)
        path = Path(top, "file")
        path.write_text("some bytes")
        path.chmod(0o644)
        yield path


# A program that runs as the caller's user owns the file that it gets as a stream: it is carried through a pipe then.


@pytest.mark.parametrize("wall", with_starts(LEVELS))
def test_a_file_that_is_passed_for_reading_is_not_written(wall: str, given: Path) -> None:
    with open(given, "rb") as file:
        inside(Attack("", "os.write(os.open('/proc/self/fd/0', os.O_WRONLY | os.O_TRUNC), b'changed')"), wall, stdin=file).check()
    assert given.read_text() == "some bytes"


@pytest.mark.parametrize("wall", with_starts(LEVELS))
def test_a_file_that_is_passed_for_reading_keeps_its_mode(wall: str, given: Path) -> None:
    with open(given, "rb") as file:
        inside(Attack("", "os.fchmod(0, 0o600)"), wall, stdin=file).check()
    assert stat.S_IMODE(given.stat().st_mode) == 0o644


@pytest.mark.parametrize("wall", with_starts(LEVELS))
def test_a_log_that_is_passed_for_appending_is_not_cut(wall: str, given: Path) -> None:
    with open(given, "ab") as log:
        inside(Attack("", "os.open('/proc/self/fd/2', os.O_WRONLY | os.O_TRUNC)\nos.write(2, b' and more')"), wall, stderr=log)
    assert given.read_text().startswith("some bytes")


def test_files_as_streams_are_read_and_written_to_their_end(given: Path) -> None:
    data = os.urandom(3 << 20)
    given.write_bytes(data)
    with open(given, "rb") as source, tempfile.TemporaryFile() as target:
        nsjail_py.run(["/bin/cat"], stdin=source, stdout=target).check()
        target.seek(0)
        assert target.read() == data


@pytest.mark.parametrize("start", ["exec", "warm"])
def test_a_file_that_takes_output_keeps_what_is_in_it(start: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    source = "import fcntl, os\nprint('said', flush=True)\nfor act in (lambda: fcntl.fcntl(1, fcntl.F_SETFL, 0), lambda: os.ftruncate(1, 0), lambda: os.lseek(1, 0, 0), lambda: os.pread(1, 9, 0)):\n  try: act()\n  except OSError: pass\nprint('FORGED')"  # fmt: skip
    with open(tmp_path / "log", "a") as log:
        nsjail_py.Jail("moderate", **({"preload": []} if start == "warm" else {})).run_python(source, stdout=log).check()
        print("after", file=log)
    assert (tmp_path / "log").read_text() == "before\nsaid\nFORGED\nafter\n"


@pytest.mark.parametrize("mode", ["wb", "ab", "r+b"])
@pytest.mark.parametrize("size", [(1 << 20) + 1, 3 << 20], ids=["a byte", "much"])
def test_a_file_as_a_stream_becomes_no_larger_than_a_file_may(size: int, mode: str, given: Path) -> None:
    """From where it is written to, as the kernel counts. What fits into it by a byte less does no harm."""
    with open(given, mode) as file:
        before = file.seek(5) if mode == "r+b" else file.tell()
        result = nsjail_py.run(["/usr/bin/head", f"-c{size - before}", "/dev/zero"], stdout=file, file_size="1M")
    assert given.stat().st_size == 1 << 20
    assert result.verdict is Verdict.disk and result.evidence == {"limit": 1 << 20, "signal": signal.SIGXFSZ}, result.summary
    with open(given, mode) as file:
        file.truncate(0)
        assert nsjail_py.run(["/usr/bin/head", f"-c{1 << 20}", "/dev/zero"], stdout=file, file_size="1M").ok
    assert given.stat().st_size == 1 << 20


def test_two_streams_that_are_one_file_have_one_limit(given: Path) -> None:
    """Python ignores the signal: its calls fail."""
    source = "import os\nfor _ in range(400): os.write(1, bytes(8000)); os.write(2, bytes(8000))"
    with open(given, "wb") as file:
        result = nsjail_py.run_python(source, stdout=file, stderr=file, file_size="1M")
    assert given.stat().st_size == 1 << 20 and result.verdict in (Verdict.disk, Verdict.exit), result.summary


def test_a_file_that_the_output_does_not_fit_into_is_an_error(tmp_path: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        result = nsjail_py.run(["/bin/echo", "lost"], stdout=full)
    assert result.verdict is Verdict.exit and b"No space left" in result.stderr


# A signal that the program sends itself is not the limit that the kernel sends it for.


def test_a_limit_of_processor_time_that_was_not_reached_is_not_the_verdict() -> None:
    result = nsjail_py.run_python(ACCUSE.format(int(signal.SIGXCPU)))
    assert (result.verdict, result.signal) == (Verdict.signal, signal.SIGXCPU), result.summary


def test_no_limit_that_is_not_set_is_the_verdict() -> None:
    result = nsjail_py.run_python(ACCUSE.format(int(signal.SIGXFSZ)))
    assert (result.verdict, result.signal) == (Verdict.signal, signal.SIGXFSZ), result.summary
    result = nsjail_py.run_python(ACCUSE.format(int(signal.SIGSYS)), policy="trusted")
    assert (result.verdict, result.signal) == (Verdict.signal, signal.SIGSYS), result.summary


ACCUSE = "import os, signal\nsignal.signal({0}, signal.SIG_DFL)\nos.kill(os.getpid(), {0})"


# Without a control group the clock has to ask each process, also for children that are gone and for those of its threads.


def test_children_that_were_waited_for_count_at_once() -> None:
    burn = "e = time.process_time() + 0.02\n    while time.process_time() < e: pass\n    os._exit(0)"
    source = f"end = time.monotonic() + 2.5\nwhile time.monotonic() < end:\n  if os.fork() == 0:\n    {burn}\n  os.wait()\nwon()"
    outside(Attack("", source))
    result = inside(Attack("", source), "moderate", cpu_time=0.3)
    assert result.verdict is Verdict.cpu_time and b"WON" not in result.stdout and result.cpu_time < 1.0 * PATIENCE, result.summary


def test_children_of_a_thread_count_too() -> None:
    burn = "e = time.monotonic() + 2.5\nwhile time.monotonic() < e: pass\nwon()\nos._exit(0)"
    source = f"def child():\n  if os.fork() == 0: exec({burn!r})\nt = threading.Thread(target=child)\nt.start()\ntime.sleep(2.8)"
    outside(Attack("", source))
    result = inside(Attack("", source), "moderate", cpu_time=0.3)
    assert result.verdict is Verdict.cpu_time and b"WON" not in result.stdout, result.summary


# Shared memory is nobody's private memory: RLIMIT_DATA does not count it.


@pytest.mark.parametrize("wall", with_starts(["untrusted", "moderate"]))
def test_shared_memory_is_limited(wall: str) -> None:
    fill = Attack("", "m = mmap.mmap(-1, 220 << 20)\nfor i in range(0, len(m), 4096): m[i] = 1\nwon()")
    outside(fill)
    result = held(inside(fill, wall, memory="48M"))
    assert result.verdict is Verdict.memory, result.summary


def test_the_memory_of_all_processes_together_is_limited() -> None:
    fill = Attack(
        "",
        "for n in range(6):\n  if os.fork() == 0:\n    m = bytearray(40 << 20)\n    time.sleep(3)\n    won()\n    os._exit(0)\ntime.sleep(4)",
    )
    result = inside(fill, "moderate", memory="100M")
    assert result.verdict is Verdict.memory and result.stdout.count(b"WON") < 3, result.summary


def test_memory_that_processes_share_counts_once() -> None:
    source = "m = bytearray(60 << 20)\nfor n in range(4):\n  if os.fork() == 0:\n    time.sleep(1)\n    os._exit(0)\nfor n in range(4): os.wait()"
    inside(Attack("", source), "moderate", memory="128M").check()


# Landlock's rules only add: execute on "/" would be one for /work.


def test_landlock_alone_refuses_what_was_written_where_other_programs_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    build = compiled.rootfs.build
    monkeypatch.setattr(compiled.rootfs, "build", lambda policy, *rest: build(replace(policy, exec_in_writable=True), *rest))
    source = "data = open('/proc/self/exe', 'rb').read()\nopen('/work/p', 'wb').write(data)\nos.chmod('/work/p', 0o755)\nif os.spawnv(os.P_WAIT, '/work/p', ['p', '-c', '0']) == 0: won()"
    held(inside(Attack("", source), replace(WALLS["no-filter"], hostname="landlock-finding")))


# Two signals are the C library's own, and signal(2) of it cannot set them back: posix_spawn leaves them ignored.


def test_no_signal_at_all_is_ignored() -> None:
    text = nsjail_py.run(["/bin/cat", "/proc/self/status"], policy="moderate").check().stdout.decode()
    assert next(line for line in text.splitlines() if line.startswith("SigIgn")).split()[1] == "0" * 16
