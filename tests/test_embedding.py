"""Inside a large, busy program: threads, asyncio, a big heap, an ignored SIGCHLD; a thousand runs each way, all right, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE, _children
from msgspec.structs import replace

import nsjail_py
from nsjail_py import PIPE, Verdict, aio, launcher
from nsjail_py.streams import ready

HEAVY = """
import asyncio, os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import nsjail_py
from nsjail_py import aio
from conftest import settled, traces

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
heap = bytearray(512 << 20)
for i in range(0, len(heap), 4096): heap[i] = 1
stop = threading.Event()
idle = [threading.Thread(target=stop.wait, daemon=True) for _ in range(20)]
for thread in idle: thread.start()

jail = nsjail_py.Jail("untrusted")
before = settled()
wrong = []

def work(number):
    for turn in range({each}):
        text = b"%d-%d" % (number, turn)
        result = jail.run(["/bin/cat"], input=text)
        if not (result.ok and result.stdout == text): wrong.append(result)

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong[0]

async def one(number, gate):
    async with gate:
        result = await aio.run(["/bin/cat"], input=b"%d" % number)
        if not (result.ok and result.stdout == b"%d" % number): wrong.append(result)

async def all_of_them():
    gate = asyncio.Semaphore(16)
    await asyncio.gather(*(one(n, gate) for n in range({each} * 8)))

asyncio.run(all_of_them())
assert not wrong, wrong[0]
stop.set()
for thread in idle: thread.join()
for _ in range(150):  # the jails in stock, too: ten seconds after the last run
    if traces() == before: break
    time.sleep(0.1)
assert traces() == before, (before, traces())
print("whole")
"""


def test_a_thousand_runs_from_threads_and_a_thousand_from_asyncio_leave_nothing() -> None:
    source = HEAVY.format(tests=str(Path(__file__).parent), each=125)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=1800, check=False)
    assert done.stdout == "whole\n", done.stderr[-3000:]


def test_asyncio_runs_do_not_block_the_loop() -> None:
    async def main() -> int:
        ticks = 0
        task = asyncio.create_task(aio.run_python("import time; time.sleep(0.5)"))
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert (await task).ok
        return ticks

    assert asyncio.run(main()) > 10


@pytest.mark.usefixtures("leaves_nothing")
def test_cancelling_a_task_kills_its_jail() -> None:
    async def main() -> None:
        task = asyncio.create_task(aio.run(["/bin/sleep", "60"]))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 10 * PATIENCE


@pytest.mark.parametrize("times", [1, 2])
def test_the_loop_goes_on_while_a_cancelled_run_ends(times: int) -> None:
    """Which may take as long as it likes: the launcher is stopped here. Cancelled once more, the task does not wait for that."""

    async def main(pid: int) -> tuple[float, bool]:
        task = asyncio.create_task(aio.run(["/bin/sleep", "60"]))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGSTOP)
        waker = threading.Timer(3 * PATIENCE, os.kill, (pid, signal.SIGCONT))
        waker.start()
        began = time.monotonic()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.1)
        took, done = time.monotonic() - began, task.done()
        waker.cancel()
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(asyncio.CancelledError):
            await task
        return took, done

    took, done = asyncio.run(main(launcher.current().pid))
    assert took < 2 * PATIENCE and done == (times == 2)


def test_a_look_at_a_handle_does_not_take_its_end_from_asyncio() -> None:
    async def main() -> None:
        process = await asyncio.to_thread(nsjail_py.Jail("untrusted").start, ["/bin/echo", "hi"], stdout=PIPE)
        task = asyncio.create_task(aio.communicate(process))
        await asyncio.sleep(0)
        while process.poll() is None:
            time.sleep(0.01)
        assert (await asyncio.wait_for(task, 10)).stdout == b"hi\n"

    asyncio.run(main())


def test_a_second_communicate_at_a_time_is_an_error_and_the_first_goes_on() -> None:
    async def main() -> None:
        with await asyncio.to_thread(nsjail_py.Jail("untrusted").start, ["/bin/cat"], stdin=PIPE, stdout=PIPE) as process:
            data = b"x" * 1_000_000
            first, second = await asyncio.wait_for(
                asyncio.gather(aio.communicate(process, data), aio.communicate(process), return_exceptions=True), 10
            )
            assert isinstance(first, nsjail_py.Result) and first.stdout == data and isinstance(second, RuntimeError)
            assert (await aio.communicate(process)).stdout == data

    asyncio.run(main())


def test_asyncio_carries_input_and_output_and_limits() -> None:
    data = b"x" * 1_000_000
    assert asyncio.run(aio.run(["/bin/cat"], input=data)).stdout == data
    assert asyncio.run(aio.run_python("while True: print(1)", output="1K")).verdict is Verdict.output


def test_death_of_the_caller_is_the_end_of_every_jail() -> None:
    source = "import nsjail_py, os\np = nsjail_py.Jail('untrusted').start(['/bin/sleep', '60'])\nprint(p.pid, flush=True)\nos.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30 * PATIENCE, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


ADOPTS = """
import ctypes, os, time, nsjail_py
from pathlib import Path
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: as process 1 of a container
jail = nsjail_py.Jail("untrusted")
process = jail.start(["/bin/sleep", "60"])
for _ in range(3): jail.run(["/bin/true"])
nsjail_py.launcher.shutdown()
print([Path(f"/proc/{child}/stat").read_text() for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()])
"""


def test_an_orderly_end_leaves_no_dead_process_to_a_caller_who_adopts_them() -> None:
    assert subprocess.run([sys.executable, "-c", ADOPTS], capture_output=True, text=True, check=False).stdout == "[]\n"


def test_odd_states_of_the_caller_do_no_harm() -> None:
    source = """
import os, signal, prctl, nsjail_py
prctl.set_child_subreaper(1)
prctl.set_dumpable(0)
prctl.set_name("odd")
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
os.umask(0o777)
os.chdir("/")
print(nsjail_py.run_python("import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))").stdout)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert done.stdout == "b'set()\\n'\n", done.stderr[-2000:]


RIGHTS = """
import os, shutil, tempfile, time
import nsjail_py
from nsjail_py import launcher
nsjail_py.run(["/bin/true"], policy="trusted")  # everything is imported now: the interpreter may be where only root may look
launcher.shutdown()
top = tempfile.mkdtemp()
launcher.PROGRAM = shutil.copy(launcher.PROGRAM, top)
os.environ["NSJAIL_PY_CACHE"] = top
os.chown(top, {first}, -1)
os.seteuid({first})
nsjail_py.run(["/bin/true"], policy="trusted")
os.seteuid(0)
os.chown(top, {then}, -1)
os.seteuid({then})
try:
    insisting = dict(own_uid=True, best_effort=["cgroup", "swap", "cpus", "cpuset", "nested_userns"])
    result = nsjail_py.run(["/bin/true"], policy="trusted", **insisting)
    print(result.mode, *(one.state for one in result.protections if one.name in ("own_uid", "groups")))
except nsjail_py.Unavailable as error:
    print(error)
began = time.monotonic()
launcher.shutdown()
print(time.monotonic() - began < 1)
os.seteuid(0)
shutil.rmtree(top)
"""


@pytest.mark.skipif(not IS_ROOT, reason="only root can become somebody else")
@pytest.mark.parametrize(("first", "then", "said"), [(65534, 0, "protections (own_uid: only root"), (0, 65534, "root applied applied\n")])
def test_what_is_said_of_a_run_rests_on_the_launchers_rights_and_not_on_the_callers_of_now(first: int, then: int, said: str) -> None:
    """The launcher has had its own since it was started; the caller may have taken others, or given root up."""
    source = RIGHTS.format(first=first, then=then)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert done.stdout.startswith(said) and done.stdout.endswith("\nTrue\n"), done.stdout + done.stderr[-2000:]


WAYS = {
    "cold": "nsjail_py.run(['/bin/true']).check()\nnsjail_py.run_python('pass').check()",
    "warm": "with nsjail_py.Jail('untrusted', preload=[]) as jail, jail.session() as session:\n  jail.run_python('pass').check()\n  session.run('1').check()",
}


@pytest.mark.parametrize("way", WAYS)
def test_the_caller_is_never_forked(way: str) -> None:
    """With its threads and its heap. The launcher is spawned; what an interpreter is asked about itself is a subprocess, which is no copy either."""
    source = f"""
import sys
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in ("os.fork", "os.forkpty", "os.posix_spawn") else None)
import nsjail_py
{WAYS[way]}
print(set(started))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert done.stdout == "{'os.posix_spawn'}\n", done.stdout + done.stderr[-2000:]


def test_a_caller_without_standard_streams_gets_the_same(tmp_path: Path) -> None:
    """Numbers 0 to 2 are free there, and ours may get them."""
    source = f"""
import os
kept = os.open({str(tmp_path / "said")!r}, os.O_WRONLY | os.O_CREAT)
os.dup2(kept, 100)
os.closerange(0, 100)
import nsjail_py
seen = [nsjail_py.run(["/bin/cat"], input=b"in").stdout for _ in range(4)]
result = nsjail_py.run_python("import os, sys; print(len(os.listdir('/proc/self/fd'))); print('err', file=sys.stderr)")
os.write(100, repr((seen, result.stdout, result.stderr)).encode())
"""
    assert subprocess.run([sys.executable, "-c", source], timeout=60 * PATIENCE, check=False).returncode == 0
    assert eval((tmp_path / "said").read_text()) == ([b"in"] * 4, b"4\n", b"err\n")


@contextlib.contextmanager
def forked(act: Callable[[], object]) -> Iterator[None]:
    """With a child that has done this, and lives on meanwhile."""
    (stay, go), (hear, say) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        status = 1
        try:
            act()
            status = 0
        finally:
            os.write(say, b"done")
            os.read(stay, 1)
            launcher.shutdown()
            os._exit(status)
    try:
        if not ready([hear], 30 * PATIENCE):
            os.kill(child, signal.SIGKILL)
        yield
    finally:
        for descriptor in (go, stay, hear, say):
            os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0


def gone(pid: int | None) -> bool:
    deadline = time.monotonic() + 5 * PATIENCE
    while (there := Path(f"/proc/{pid}").exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not there


def test_a_forked_child_does_not_keep_the_runs_of_its_parent() -> None:
    process = nsjail_py.Jail("untrusted").start(["/bin/sleep", "60"])
    pid = process.pid
    with forked(lambda: None):
        del process
        assert gone(pid)


def test_a_forked_child_does_not_keep_the_input_of_its_parent_open() -> None:
    process = nsjail_py.Jail("untrusted").start(["/bin/cat"], stdin=PIPE, stdout=PIPE)
    with forked(lambda: None):
        assert process.communicate(b"text", timeout=10).stdout == b"text"


@pytest.mark.elsewhere(IS_ROOT, why="root gives a run the file itself")
def test_a_forked_child_does_not_keep_the_input_open_that_is_carried_from_a_file_of_the_caller_s(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(1 << 20))
    source = "import sys, time; time.sleep(0.3); print(len(sys.stdin.buffer.read()))"
    with (tmp_path / "input").open("rb") as file:
        process = nsjail_py.Jail("untrusted", wall_time=30 * PATIENCE).start_python(source, stdin=file, stdout=PIPE)
    with forked(lambda: None):
        assert process.communicate(timeout=20 * PATIENCE).stdout == b"1048576\n"


def test_an_executor_in_a_forked_child_has_workers_of_its_own() -> None:
    def use() -> None:
        assert pool.submit(abs, -2).result(30 * PATIENCE) == 2
        pool.shutdown()

    with nsjail_py.JailExecutor("untrusted", 1) as pool:
        assert pool.submit(abs, -1).result(30 * PATIENCE) == 1
        with forked(use):
            pass
        assert pool.submit(abs, -3).result(30 * PATIENCE) == 3

    def refused() -> None:
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(abs, -4)

    with forked(refused):
        pass


def test_a_fork_while_a_call_is_pickled_does_not_hold_the_childs_calls_up() -> None:
    pickling, go_on = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self) -> tuple[type, tuple[()]]:
            pickling.set()
            go_on.wait(60 * PATIENCE)
            return int, ()

    def use() -> None:
        assert pool.submit(abs, -2).result(30 * PATIENCE) == 2
        pool.shutdown()

    with nsjail_py.JailExecutor("untrusted", 1) as pool, ThreadPoolExecutor() as threads:
        call = threads.submit(pool.submit, abs, Slow())
        assert pickling.wait(30 * PATIENCE)
        with forked(use):
            go_on.set()
        assert call.result(30 * PATIENCE).result(30 * PATIENCE) == 0


def test_a_forked_child_does_not_keep_the_warm_interpreter_of_its_parent() -> None:
    with nsjail_py.Jail("untrusted", preload=[]) as jail:
        before = {*_children(launcher.current().pid)}
        jail.run_python("pass").check()
        [template] = {*_children(launcher.current().pid)} - before
        with forked(lambda: None):
            jail.close()
            assert gone(int(template))


def test_a_fork_while_a_warm_interpreter_is_made_has_one_of_its_own() -> None:
    with nsjail_py.Jail("untrusted", preload=["json"]) as jail, ThreadPoolExecutor() as pool:
        first = pool.submit(jail.run_python, "pass")
        assert jail._templates is not None
        while not jail._templates._making.locked():
            time.sleep(0.001)
        with forked(lambda: jail.run_python("pass").check()):
            assert first.result(30 * PATIENCE).ok


def test_the_handle_of_a_run_of_the_parent_does_nothing_in_a_forked_child() -> None:
    def use() -> None:
        with process:
            pass
        asks: list[Callable[[], object]] = [process.wait, process.poll, process.kill, process.communicate, lambda: process.pid]
        for ask in (*asks, lambda: asyncio.run(aio.communicate(process)), lambda: next(process.stream())):
            with pytest.raises(nsjail_py.JailError, match="belongs to the process that started it"):
                ask()

    with nsjail_py.Jail("untrusted").start(["/bin/cat"], stdin=PIPE, stdout=PIPE) as process:
        with forked(use):
            pass
        assert process.communicate(b"text").stdout == b"text" and process.wait().ok


def test_a_session_of_the_parent_does_nothing_in_a_forked_child_and_goes_on_in_the_parent() -> None:
    """Also where another thread has a cell running at the fork."""

    def use() -> None:
        with pytest.raises(SystemExit) as caught, session:
            raise SystemExit(3)
        assert caught.value.code == 3
        calls: list[Callable[[], object]] = [lambda: session.run("1"), session.checkpoint, session.restore, session.interrupt]
        for call in (*calls, lambda: session.put("a", b""), lambda: session.get("a")):
            with pytest.raises(nsjail_py.JailError, match="belongs to the process that started it"):
                call()
        assert session._socket.fileno() < 0
        with jail.session() as own:
            assert own.run("1").check().value == "1"

    with nsjail_py.Jail("untrusted") as jail, jail.session() as session, ThreadPoolExecutor() as pool:
        running = pool.submit(session.run, f"import time; x = 1; time.sleep({PATIENCE})")
        while not session._asked and not running.done():
            time.sleep(0.001)
        with forked(use):
            running.result(30 * PATIENCE).check()
        assert session.run("x").check().value == "1"


@pytest.mark.elsewhere(find_spec("mypy") is None, why="mypy is not installed (./dev check installs it)")
def test_a_name_that_is_not_there_is_an_error_to_type_checkers(tmp_path: Path) -> None:
    from mypy import api

    options = ["--config-file=", f"--cache-dir={tmp_path}", "--strict", "--follow-imports=silent"]
    said, _, _ = api.run([*options, "-c", "import nsjail_py; nsjail_py.aio; nsjail_py.nothing"])
    assert said.splitlines()[:-1] == ['<string>:1: error: Module has no attribute "nothing"  [attr-defined]']


UNREAD = {"Audit", "Cell", "Claim", "Entry", "Host", "Membership", "Posture", "Protection", "Report", "Result"}
"""Structs that nothing is read into."""
READY = """
import contextlib, importlib, sys, msgspec, nsjail_py
from pathlib import Path
top, found, kinds = Path(nsjail_py.__file__).parent, [], {}
for path in top.rglob("*.py"):
    if "msgspec" in path.read_text() and not path.stem.endswith("_inside"):
        name = ".".join(("nsjail_py", *path.relative_to(top).with_suffix("").parts)).removesuffix(".__init__")
        kinds |= {kind: name for name, kind in vars(importlib.import_module(name)).items() if isinstance(kind, type)}
kinds = {kind: name for kind, name in kinds.items() if issubclass(kind, msgspec.Struct) and kind.__struct_fields__ or name == "Filter"}
sys.setprofile(lambda frame, event, _: event == "call" and frame.f_code.co_name == "get_class_annotations" and found.append(kind))
for kind in kinds:
    with contextlib.suppress(NameError): msgspec.json.Decoder(kind)  # what is only written may name what is not loaded
sys.setprofile(None)
print(len(kinds) > 20, *sorted({kinds[kind] for kind in found}))
"""


def test_what_data_is_read_into_is_ready_when_its_module_is_there() -> None:
    """Found out by two threads at once, a type of msgspec's ends the process."""
    done = subprocess.run([sys.executable, "-c", READY], capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert (set(done.stdout.split()), done.stderr) == ({"True"} | UNREAD, "")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = nsjail_py.nothing


def test_every_error_comes_back_from_another_process_and_can_be_copied() -> None:
    errors: list[nsjail_py.JailError] = [
        nsjail_py.PolicyError("one", "two"),
        nsjail_py.SetupError("step", 2, "detail", "advice"),
        nsjail_py.Unavailable("step", detail="detail"),
        nsjail_py.LauncherDied("text"),
        nsjail_py.SessionError("text"),
        nsjail_py.JobError("ValueError", "text", "Traceback"),
    ]
    with pytest.raises(nsjail_py.RunFailed) as failed:
        nsjail_py.run(["/bin/false"]).check()
    with pytest.raises(nsjail_py.ScriptRefused) as refused:
        nsjail_py.run_python("eval(input())", policy=replace(nsjail_py.policy("untrusted"), python=nsjail_py.Python(scan="refuse")))
    for error in (*errors, failed.value, refused.value):
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_run_is_usable_at_interpreter_exit_and_after_shutdown() -> None:
    launcher.shutdown()
    assert nsjail_py.run(["/bin/true"]).ok
