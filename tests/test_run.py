"""Whole runs through the Python interface: what goes in comes out, every end has its verdict, nothing is left."""

from __future__ import annotations

import array
import asyncio
import gc
import os
import signal
import subprocess
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import IS_ROOT, PATIENCE

import nsjail_py
from nsjail_py import DEVNULL, PIPE, STDOUT, Jail, Process, Result, Verdict
from nsjail_py.launcher import UID_BASE

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def test_a_program_gets_its_input_and_its_output_comes_back() -> None:
    result = nsjail_py.run(["/usr/bin/sort"], input=b"b\na\n")
    assert (result.verdict, result.exit_code, result.stdout, result.stderr) == (Verdict.ok, 0, b"a\nb\n", b"")


def test_input_has_one_source_and_no_stdin_is_none() -> None:
    assert nsjail_py.run(["/bin/cat"], input=b"text", stdin=None).stdout == b"text"
    assert asyncio.run(nsjail_py.aio.run(["/bin/cat"], input=b"text", stdin=None)).stdout == b"text"
    with pytest.raises(ValueError, match="cannot both"):
        nsjail_py.run(["/bin/cat"], input=b"text", stdin=DEVNULL)


def test_any_buffer_is_input_whole() -> None:
    numpy = pytest.importorskip("numpy")
    numbers = array.array("i", range(50_000))
    table = numpy.arange(12, dtype=">i4").reshape(3, 4)
    buffers = [
        numbers,
        numpy.array(numbers),
        table,
        table.T,
        table[:, ::2],
        numpy.zeros((0, 3)),
        bytearray(b"text"),
        memoryview(b"text")[::-1],
    ]
    for buffer in buffers:
        assert nsjail_py.run(["/bin/cat"], input=buffer).stdout == memoryview(buffer).tobytes()
    with pytest.raises(TypeError):
        nsjail_py.run(["/bin/cat"], input="text")


def test_python_source_runs_at_every_level(level: str) -> None:
    result = nsjail_py.run_python("import sys; print(6*7); print('e', file=sys.stderr)", policy=level)
    assert (result.verdict, result.stdout, result.stderr) == (Verdict.ok, b"42\n", b"e\n"), result


def test_a_script_sees_itself_as_a_user_expects() -> None:
    source = "import sys, os; print(sys.argv, __file__, __name__, os.getcwd(), os.environ['HOME'], open(__file__).read(6))"
    result = nsjail_py.run_python(source, args=["a", "b c"], filename="hello.py")
    assert result.stdout == b"['/app/hello.py', 'a', 'b c'] /app/hello.py __main__ /work /work import\n", result


def test_exit_code_and_signal_are_the_programs_own() -> None:
    assert (r := nsjail_py.run_python("raise SystemExit(7)")).verdict is Verdict.exit and r.exit_code == 7
    result = nsjail_py.run_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (result.verdict, result.signal, result.exit_code) == (Verdict.signal, signal.SIGSEGV, None)


def test_abort_is_seen_as_abort_since_the_program_is_not_process_one() -> None:
    result = nsjail_py.run_python("import os; print(os.getpid(), flush=True); os.abort()")
    assert result.signal == signal.SIGABRT and int(result.stdout) > 1


def test_processor_time_is_limited_and_named() -> None:
    result = nsjail_py.run_python("while True: pass", cpu_time=0.3)
    assert result.verdict is Verdict.cpu_time and result.evidence["limit"] == 0.3
    assert 0.3 <= result.cpu_time < 0.6 * PATIENCE


def test_processor_time_of_all_threads_counts_together() -> None:
    burn = "import threading, hashlib\ndef f():\n  while True: hashlib.sha256(b'x'*1000000)\n[threading.Thread(target=f).start() for _ in range(3)]"
    result = nsjail_py.run_python(burn, cpu_time=0.4)
    assert result.verdict is Verdict.cpu_time and result.wall_time < 3 * PATIENCE


def test_wall_time_is_limited_and_named() -> None:
    result = nsjail_py.run_python("import time; time.sleep(60)", wall_time="200ms")
    assert result.verdict is Verdict.wall_time and 0.2 <= result.wall_time < 1.0 * PATIENCE


def test_wall_time_holds_while_the_caller_looks_away() -> None:
    process = Jail("untrusted", wall_time=0.2).start_python("import time; time.sleep(60)")
    time.sleep(0.6 * PATIENCE)
    assert process.poll() is not None and process.wait().wall_time < 0.5 * PATIENCE


def test_idle_time_is_limited_and_named() -> None:
    result = nsjail_py.run_python("import time; time.sleep(60)", idle_time=0.3)
    assert result.verdict is Verdict.idle and result.wall_time < 2 * PATIENCE


def test_memory_is_limited() -> None:
    result = nsjail_py.run_python("x = bytearray(300 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1", memory="64M")
    if result.memory_source == "rusage":  # without a cgroup the kernel refuses the memory, and Python says so
        assert b"MemoryError" in result.stderr
    else:
        assert result.verdict is Verdict.memory and result.oom_events and result.peak_memory <= 64 << 20


def test_output_is_bounded_and_named() -> None:
    result = nsjail_py.run_python("while True: print('x' * 1000)", output="100K")
    assert result.verdict is Verdict.output and len(result.stdout) == 100 * 1024 and result.stdout_cut


def test_disk_is_limited_and_named() -> None:
    result = nsjail_py.run_python("open('big', 'wb').write(bytes(9 << 20))", disk="8M")
    assert result.verdict is Verdict.disk and b"No space left" in result.stderr


def test_disk_counts_work_tmp_and_shared_memory_together() -> None:
    source = "for p in ('/work/a', '/tmp/a', '/dev/shm/a'): open(p, 'wb').write(bytes(3 << 20))"
    assert nsjail_py.run_python(source, disk="8M").verdict is Verdict.disk
    assert nsjail_py.run_python(source, disk="12M").ok


def test_number_of_files_is_limited() -> None:
    result = nsjail_py.run_python("for i in range(10**6): open(f'f{i}', 'w')", files=1000)
    assert result.verdict is Verdict.disk


def test_open_files_are_limited() -> None:
    result = nsjail_py.run_python("import os\nk = []\nwhile True: k.append(os.dup(0))", open_files=32)
    assert b"Too many open files" in result.stderr


def test_processes_are_limited_and_named() -> None:
    bomb = "import os, time\nfor i in range(100):\n  if os.fork() == 0: time.sleep(5); os._exit(0)"
    result = nsjail_py.run_python(bomb, policy="moderate", processes=8)
    assert b"BlockingIOError" in result.stderr
    assert result.verdict is (Verdict.exit if result.memory_source == "rusage" else Verdict.processes)


def test_the_run_ends_with_the_main_process_and_takes_the_rest_along() -> None:
    source = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(60)\nprint('done')"
    result = nsjail_py.run_python(source, policy="moderate")
    assert result.ok and result.stdout.endswith(b"done\n") and result.wall_time < 5 * PATIENCE


def test_denied_system_calls_are_named_and_counted() -> None:
    source = "import socket\nfor i in range(3):\n  try: socket.socket()\n  except PermissionError: pass"
    result = nsjail_py.run_python(source)
    assert result.ok and result.denied == {"socket": 3}


def test_kill_on_denial_ends_the_run_at_the_first_one() -> None:
    from msgspec.structs import replace

    strict = nsjail_py.policy("untrusted")
    assert strict.syscalls is not None
    strict = replace(strict, syscalls=replace(strict.syscalls, on_denied="kill"))
    result = nsjail_py.run_python("import os; os.fork(); print('on')", policy=strict)
    assert result.verdict is Verdict.syscall and result.stdout == b"" and sum(result.denied.values()) == 1


def test_every_protection_has_a_state_and_a_missing_one_a_reason() -> None:
    protections = nsjail_py.run(["/bin/true"]).protections
    assert {p.state for p in protections} <= {"applied", "unavailable", "not requested"}
    assert all(p.reason for p in protections if p.state == "unavailable")
    if IS_ROOT:  # an older kernel's Landlock knows neither TCP nor scopes
        assert {p.name for p in protections if p.state == "unavailable"} <= {"landlock_net", "landlock_scope"}


def test_check_raises_on_anything_but_ok() -> None:
    assert nsjail_py.run(["/bin/true"]).check().ok
    with pytest.raises(nsjail_py.RunFailed, match="exited with 1"):
        nsjail_py.run(["/bin/false"]).check()


def test_a_handle_streams_both_ways_and_ends_with_a_result() -> None:
    with Jail("untrusted").start(["/bin/cat"], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hello\n")
        assert process.stdout.read(6) == b"hello\n"
        assert process.pid and os.path.exists(f"/proc/{process.pid}") and process.poll() is None
        process.stdin.close()
        assert process.wait(5).ok


def test_the_names_of_streams_are_those_of_subprocess() -> None:
    assert (PIPE, STDOUT, DEVNULL) == (subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL)


def test_kill_signal_and_timeout_behave_as_popen_has_taught() -> None:
    jail = Jail("untrusted")
    with jail.start_python("import time; time.sleep(60)") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
        assert process.wait(5).verdict is Verdict.killed
        process.kill()
    with jail.start_python(
        "import signal, time\nsignal.signal(15, lambda *a: exit(3))\nprint(1, flush=True)\nwhile True: time.sleep(0.01)", stdout=PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.read(2) == b"1\n"
        process.terminate()
        assert process.wait(5).exit_code == 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGRTMIN, signal.SIGRTMIN + 1, signal.SIGRTMAX - 1, signal.SIGRTMAX])
def test_every_signal_can_be_sent(number: int) -> None:
    with Jail("untrusted").start(["/bin/sleep", "60"]) as process:
        process.send_signal(number)
        assert process.wait(5 * PATIENCE).signal == number


@pytest.mark.parametrize("number", [-1, 0, signal.SIGRTMAX + 1, 1 << 40])
def test_what_is_no_signal_is_an_error(number: int) -> None:
    with Jail("untrusted").start(["/bin/sleep", "60"]) as process, pytest.raises(ValueError, match="not a valid signal"):
        process.send_signal(number)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("timeout", [1e7, 1e300, float("inf")])
def test_a_timeout_may_be_of_any_length(timeout: float) -> None:
    jail = Jail("untrusted")
    assert jail.start(["/bin/true"]).wait(timeout).ok
    assert jail.start(["/bin/true"]).communicate(timeout=timeout).ok
    assert jail.run(["/bin/true"], timeout=timeout).ok
    assert asyncio.run(nsjail_py.aio.run(["/bin/true"], timeout=timeout)).ok


def test_a_wait_that_is_longer_than_one_call_may_be_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsjail_py.streams.LONGEST_MS", 10)
    jail = Jail("untrusted")
    for wait in (lambda process, seconds: process.wait(seconds), lambda process, seconds: process.communicate(timeout=seconds)):
        with jail.start(["/bin/sleep", "0.3"]) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                wait(process, 0.1)
            assert wait(process, 60).ok


def test_a_timeout_tells_what_the_program_had_written() -> None:
    source = "import sys, time; print(1, flush=True); print(2, file=sys.stderr); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        nsjail_py.run_python(source, timeout=PATIENCE)
    assert (caught.value.output, caught.value.stdout, caught.value.stderr) == (b"1\n", b"1\n", b"2\n")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        nsjail_py.run(["/bin/sleep", "60"], timeout=0.1)
    assert (caught.value.stdout, caught.value.stderr) == (None, None)


def test_a_run_that_is_over_holds_no_pipe_and_its_handle_goes_without_a_collector() -> None:
    gc.disable()
    try:
        process = Jail("untrusted").start(["/bin/cat"], stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert process.communicate(b"text").stdout == process.communicate().stdout == b"text"
        assert [file is not None and file.closed for file in (process.stdin, process.stdout, process.stderr)] == [True] * 3
        gone = weakref.ref(process)
        del process
        assert gone() is None
    finally:
        gc.enable()


def test_a_dropped_handle_kills_its_run() -> None:
    process = Jail("untrusted").start_python("import time; time.sleep(60)")
    pid = process.pid
    del process
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_stderr_can_go_where_stdout_goes_or_nowhere() -> None:
    both = "import sys; print(1, flush=True); print(2, file=sys.stderr)"
    assert nsjail_py.run_python(both, stderr=STDOUT).stdout == b"1\n2\n"
    assert nsjail_py.run_python(both, stderr=DEVNULL).stderr == b""


def test_listed_descriptors_cross_and_no_other() -> None:
    read, write = os.pipe()
    leaked = os.dup(read)
    os.set_inheritable(leaked, True)
    try:
        result = nsjail_py.run_python(
            f"import os; print(sorted(map(int, os.listdir('/proc/self/fd')))); os.write({write}, b'x')", pass_fds=[write]
        )
        assert os.read(read, 1) == b"x"
        seen = eval(result.stdout)
        assert {0, 1, 2, write} <= set(seen) and len(seen) == 5  # and the directory being listed
    finally:
        for descriptor in (read, write, leaked):
            os.close(descriptor)


def test_any_number_can_be_given_to_a_descriptor() -> None:
    """None of the numbers is one that the jail itself still needs."""
    read, write = os.pipe()
    numbers = [os.dup(write) for _ in range(40)]
    try:
        source = f"import os\nfor fd in {numbers}: os.write(fd, b'x')"
        nsjail_py.run_python(source, pass_fds=numbers).check()
        assert os.read(read, 100) == b"x" * 40
    finally:
        for descriptor in (read, write, *numbers):
            os.close(descriptor)


def test_work_directory_is_kept_when_it_is_given(tmp_path: object) -> None:
    nsjail_py.run_python("open('out.txt', 'w').write('kept')", workdir=str(tmp_path)).check()
    nsjail_py.run_python("assert open('out.txt').read() == 'kept'; open('out.txt', 'a').write('!')", workdir=str(tmp_path)).check()
    assert open(f"{tmp_path}/out.txt").read() == "kept!"


def test_two_runs_share_nothing_that_is_writable() -> None:
    nsjail_py.run_python("import os\nfor p in ('/work/x', '/tmp/x', '/dev/shm/x'): open(p, 'w')").check()
    nsjail_py.run_python("import os\nfor p in ('/work/x', '/tmp/x', '/dev/shm/x'): assert not os.path.exists(p)").check()


def test_a_killed_launcher_is_an_error_and_the_next_run_works() -> None:
    from nsjail_py import launcher

    process = Jail("untrusted").start_python("import time; time.sleep(60)")
    pid = process.pid
    os.kill(launcher.current().pid, signal.SIGKILL)
    with pytest.raises(nsjail_py.LauncherDied):
        process.wait(5)
    time.sleep(0.2)
    assert not os.path.exists(f"/proc/{pid}")
    assert nsjail_py.run(["/bin/true"]).ok


def test_a_forked_caller_gets_a_launcher_of_its_own() -> None:
    from nsjail_py import launcher

    ours = launcher.current().pid
    child = os.fork()
    if child == 0:
        ok = nsjail_py.run(["/bin/true"]).ok and launcher.current().pid != ours
        launcher.shutdown()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert nsjail_py.run(["/bin/true"]).ok


def test_many_threads_run_at_once() -> None:
    jail, wrong = Jail("untrusted"), []

    def work(number: int) -> None:
        for turn in range(10):
            text = f"{number}-{turn}\n".encode()
            if jail.run(["/bin/cat"], input=text).stdout != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_share_a_handle_all_get_the_result() -> None:
    jail, seen = Jail("untrusted"), Counter[str]()

    def polled(process: Process) -> Result:
        while (result := process.poll()) is None:
            time.sleep(0.0005)
        return result

    def communicated(process: Process) -> str:
        return f"{process.communicate(timeout=20).stdout!r}"

    def note(ask: Callable[[Process], object], process: Process) -> None:
        try:
            answer = ask(process)
        except Exception as error:
            answer = error
        seen[str(answer.verdict if isinstance(answer, Result) else answer)] += 1

    for turn in range(60):
        process = jail.start(["/bin/echo", "hi"], stdout=PIPE)
        asks = [lambda process: process.wait(20)] * 3 + [polled] + [communicated] * (2 * (turn % 2))
        threads = [threading.Thread(target=note, args=(ask, process)) for ask in asks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"ok": 240, "b'hi\\n'": 60}


def test_a_thread_that_asks_for_the_pid_need_not_wait_for_the_end_when_another_waits_for_it() -> None:
    jail = Jail("untrusted")
    with jail.start(["/bin/sleep", "30"]) as process:
        waiting = [threading.Thread(target=process.wait) for _ in range(4)]
        for thread in waiting:
            thread.start()
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(lambda: process.pid) for _ in range(4)]
            assert len({one.result(10) for one in asked}) == 1
        process.kill()
        for thread in waiting:
            thread.join()


def test_a_command_that_comes_too_late_does_not_hide_the_result() -> None:
    jail = Jail("untrusted")
    for _ in range(50):
        with jail.start(["/bin/true"]) as process:
            process.terminate()
            process.kill()
            process.kill()
            assert process.wait(5).verdict in (Verdict.ok, Verdict.killed, Verdict.signal)


def test_output_beyond_the_limit_is_named_even_when_the_program_ends_by_itself() -> None:
    for _ in range(20):
        assert nsjail_py.run(["/usr/bin/printf", "%0101d", "1"], output=100).verdict is Verdict.output


def test_a_directory_is_no_stream() -> None:
    descriptor = os.open("/etc", os.O_RDONLY)
    try:
        for streams in ({"stdin": descriptor}, {"pass_fds": [descriptor]}):
            with pytest.raises(nsjail_py.PolicyError, match="directory"):
                nsjail_py.run(["/bin/true"], **streams)
    finally:
        os.close(descriptor)


def test_few_open_files_are_enough_to_start() -> None:
    assert nsjail_py.run(["/bin/true"], open_files=8).ok


@pytest.mark.skipif(not IS_ROOT, reason="only root has other user ids to give")
def test_started_by_root_a_run_has_its_own_user_whether_or_not_the_policy_insists() -> None:
    result = nsjail_py.run(["/bin/true"], own_uid=False)
    assert [p.state for p in result.protections if p.name == "own_uid"] == ["applied"]
    process = Jail("untrusted", own_uid=False).start(["/bin/sleep", "9"])
    assert os.stat(f"/proc/{process.pid}").st_uid >= UID_BASE
    process.kill()
    process.wait()
