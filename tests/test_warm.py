"""Warm interpreters: a job is forked in a moment, and is otherwise a run like any other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, PATIENCE, _links
from msgspec.structs import replace

import nsjail_py
import nsjail_py.warm
from nsjail_py import PIPE, Jail, JailError, Mount, PolicyError, Result, SetupError, interpreter, launcher
from nsjail_py.layers.scan import scan
from nsjail_py.warm import Template


@pytest.fixture(scope="module")
def warm() -> Iterator[Jail]:
    with Jail("untrusted", preload=["random", "tempfile", "ssl", "uuid", "json"], stock=1) as jail:
        yield jail


@pytest.fixture(scope="module")
def cold() -> Jail:
    return Jail("untrusted")


TELLS = """
class T:
    def __init__(self, name): self.name = name
    def __del__(self): print('del', self.name)
"""
SAME = {
    "its output": "print('text'); import sys; print('more', file=sys.stderr)",
    "its arguments": "import sys; print(sys.argv, sys.orig_argv[1:], __name__, __file__, sys.path[0])",
    "its environment": "import os; print(sorted(os.environ.items()), os.getcwd())",
    "its user": "import os; print(os.getresuid(), os.getresgid(), os.getgroups(), os.getpid(), os.getsid(0))",
    "its rights": "print([l for l in open('/proc/self/status') if l.split(':')[0] in 'CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp'])",
    "its limits": "import resource; print([resource.getrlimit(kind) for kind in range(16)])",
    "its signals": "import signal; print([signal.getsignal(n) for n in (2, 13, 17)], signal.pthread_sigmask(0, []))",
    "its files": "import os; print([sorted(os.listdir(d)) for d in ('/', '/work', '/tmp', '/dev', '/dev/shm', '/etc')], os.umask(0))",
    "its network": "try: print(sorted(open('/proc/self/net/dev').read().split()))\nexcept OSError as e: print(e.errno)",
    "its processes": "import os; print([n for n in os.listdir('/proc') if n.isdigit()], os.listdir('/proc/self/fd'))",
    "a fault": "def f():\n    return 1 / 0\nf()",
    "a fault in its syntax": "x = (\n",
    "a fault in its encoding": b"# coding: latin-1\nprint(len('\xe4'), '\xe4'.encode())",
    "an exit code": "raise SystemExit(7)",
    "an exit with words": "raise SystemExit('words')",
    "what it does at exit": "import atexit; atexit.register(print, 'bye'); print('hello', end='')",
    "its threads at exit": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
    "a fault of a thread's": "import threading\ndef f():\n    1 / 0\nthreading.Thread(target=f).start()",
    "an exit of a thread's": "import threading, sys\nthreading.Thread(target=sys.exit).start()",
    "its input": "import sys; print(sys.stdin.read().upper())",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "no exec": "import os\ntry: os.execv('/bin/true', ['true'])\nexcept OSError as e: print(e.errno)\ntry: os.fork()\nexcept OSError as e: print(e.errno)",
    "no socket": "import socket\ntry: socket.socket()\nexcept OSError as e: print(e.errno)",
    "no writing to the root": "for d in ('/', '/usr', '/etc', '/app', '/proc/sys/kernel'):\n    try: open(d + '/x', 'w')\n    except OSError as e: print(e.errno)",
    "no look at process 1": "for n in ('environ', 'mem', 'maps', 'exe', 'fd', 'root'):\n    try: open('/proc/1/' + n, 'rb').read(1); print(n)\n    except OSError as e: print(n, e.errno)",
    "what is left in another file on its output": "out = open(1, 'w', closefd=False); out.write('text')",
    "what is left in the output that it has replaced": "import sys; old = sys.stdout; sys.stdout = sys.stderr; old.write('text')",
    "what is left in the output that it has wrapped": "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.buffer); print('text')",
    "what is left in the output that it has detached": "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.detach()); print('text')",
    "what is left in a file of a module's": "import json; json.out = open(1, 'w', closefd=False); json.out.write('text')",
    "what C has in its buffer": "import ctypes; ctypes.CDLL(None).printf(b'text')",
    "what is left before an interrupt": "import atexit; atexit.register(print, 'bye'); print('text'); raise KeyboardInterrupt",
    "its output where that is closed": "import sys; print('text'); sys.stdout.close()",
    "its output where that cannot be written": "import os, sys; print('text'); os.close(1); sys.exit(3)",
    "a generator that goes on": "def g():\n    try: yield\n    finally: print('finally')\nx = g(); next(x); print('end')",
    "an object's end": f"{TELLS}x = T('x'); y = T('y'); print('end')",
    "the end of objects in a circle": f"{TELLS}x = T('x'); x.x = x; y = T('y'); y.y = y; print('end')",
    "the end of a module's object": f"{TELLS}import json; json.x = T('x'); print('end')",
    "the end of an object that a module's function holds": f"{TELLS}import json; x = T('x')\ndef f(): return x\njson.f = f; print('end')",
    "the end of a thread's object": f"{TELLS}import threading; x = threading.local(); x.x = T('x')",
    "the end of an object that no collector knows": "class T:\n    __slots__ = ()\n    def __del__(self): print('del')\nimport json; json.x = T()",
    "an object's end after a fault": f"{TELLS}x = T('x')\n1 / 0",
    "a fault in an object's end": "class T:\n    def __del__(self): 1 / 0\nx = T()",
    "the end of what is weakly referred to": "import weakref\nclass A: pass\nx = A(); y = weakref.ref(x, lambda _: print('gone'))",
    "the end of a class that cannot be looked at": "class M(type): __hash__ = None\nclass A(metaclass=M): pass\nimport json; json.x = A()",
    "its finalizers": "import weakref\nclass A: pass\nx = A(); weakref.finalize(x, print, 'gone')",
    "its name": "import os; print(os.uname().nodename, open('/proc/self/cgroup').read())",
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME.keys())
def test_a_job_is_like_a_fresh_interpreter_in(source: str | bytes, warm: Jail, cold: Jail) -> None:
    def view(result: Result) -> tuple[object, ...]:
        told = result.stdout, re.sub(rb"0x[0-9a-f]+", b"0x", result.stderr)
        return result.verdict, result.exit_code, result.signal, *told, result.denied, result.protections

    assert view(warm.run_python(source, args=["a", "b c"], input=b"text\xff")) == view(
        cold.run_python(source, args=["a", "b c"], input=b"text\xff")
    )


def test_what_is_left_in_a_file_on_the_callers_descriptor_is_written(warm: Jail) -> None:
    read, write = os.pipe()
    with open(read, "rb") as file, open(write, "wb", 0) as passed:
        warm.run_python(f"file = open({write}, 'w'); file.write('text')", pass_fds=[write]).check()
        passed.close()
        assert file.read() == b"text"


NAMED = {
    "by itself": "# -*- coding: latin-1 -*-\nprint(ascii('é'))",
    "in the second line": "#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\nprint(ascii('é'))",
    "which has no such letter": "# coding: latin-1\nprint(ascii('é→'))",
    "which nobody knows": "# coding=klingon\nprint(ascii('é→'))",
    "which is no text's": "# coding: rot13\nprint(ascii('é'))",
    "which is none of a file's": "# coding: utf-16\nprint(ascii('é'))",
    "beside its mark": "\ufeff# coding: latin-1\nprint(ascii('é'))",
    "in no comment": "coding=1; print(ascii('é'))\n# coding: latin-1",
    "too late": "\n\n# coding: latin-1\nprint(ascii('é'))",
}


@pytest.mark.filterwarnings("ignore::nsjail_py.layers.scan.ScanWarning")
@pytest.mark.parametrize("source", NAMED.values(), ids=NAMED.keys())
def test_text_is_read_as_it_is_whatever_encoding_it_names(source: str, warm: Jail, cold: Jail) -> None:
    expected = b"'\\xe9\\u2192'\n" if "→" in source else b"'\\xe9'\n"
    for jail in (warm, cold, Jail("untrusted", scan="warn"), Jail("untrusted", audit="report")):
        assert jail.run_python(source).check().stdout == expected
    assert "code" in [found.rule for found in scan(source.replace("print(", "eval("))]


def test_a_job_sees_nothing_of_another(warm: Jail) -> None:
    source = "import json, os\nprint(hasattr(json, 'mark'), os.listdir('/tmp'), os.listdir('/work'))\njson.mark = 1; open('/tmp/x', 'w'); open('/work/y', 'w')"
    for _ in range(5):
        assert warm.run_python(source).check().stdout == b"False [] []\n"


def test_random_numbers_are_never_the_same(warm: Jail) -> None:
    source = (
        "import ctypes, random, ssl, tempfile, uuid, os, secrets\n"
        "c = ctypes.CDLL(None); print(c.rand(), c.random(), c.lrand48(), sep='\\n')\n"
        "print(random.random(), ssl.RAND_bytes(8).hex(), tempfile.mktemp(), uuid.uuid4(), uuid.uuid1(), os.urandom(8).hex(), secrets.token_hex(8), sep='\\n')"
    )
    drawn = [line for _ in range(8) for line in warm.run_python(source).check().stdout.splitlines()]
    assert len(set(drawn)) == len(drawn) == 80


@pytest.mark.parametrize(("preload", "name"), [("numpy.random", "numpy.random"), ("ctypes", "ctypes")])
def test_a_template_whose_jobs_would_draw_the_same_is_not_used(
    preload: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed_inside("def make_unique(extension: Any) -> None:\n", "    return\n", monkeypatch, tmp_path)
    with pytest.raises(SetupError, match=f"two jobs draw the same random numbers: {name} "), Jail("untrusted", preload=[preload]) as jail:
        jail.run_python("pass")


def test_numpy_is_there_in_a_moment_and_draws_other_numbers_each_time() -> None:
    with Jail("untrusted", preload=["numpy"], stock=2) as jail:
        source = "import numpy as np\nprint(np.arange(10).sum(), np.random.random(), np.random.default_rng().random())"
        outputs = [jail.run_python(source).check() for _ in range(4)]
        assert {result.stdout.split()[0] for result in outputs} == {b"45"}
        assert len({word for result in outputs for word in result.stdout.split()[1:]}) == 8
        assert all(result.peak_memory < 64 << 20 for result in outputs)


def test_limits_hold_in_a_job() -> None:
    with Jail("untrusted", preload=[], wall_time=0.3) as jail:
        assert jail.run_python("import time; time.sleep(9)").verdict == "wall_time"
    with Jail("untrusted", preload=[], cpu_time=0.3 * PATIENCE, memory="64M", disk="1M", output="1k", processes=4) as jail:
        assert jail.run_python("while True: pass").verdict == "cpu_time"
        memory = jail.run_python("x = bytearray(200 << 20)\nx[::4096] = b'1' * len(x[::4096])")
        assert memory.verdict == "memory" or b"MemoryError" in memory.stderr
        assert jail.run_python("open('/work/x', 'wb').write(bytes(9 << 20))").verdict == "disk"
        assert jail.run_python("print('x' * 9999)").verdict == "output"
        assert jail.run_python("print(1)").ok


def test_no_limit_of_output_keeps_a_template_from_starting() -> None:
    with Jail("untrusted", preload=["random", "uuid"], output=10) as jail:
        assert jail.run_python("print('text')").check().stdout == b"text\n"


def test_what_modules_say_at_their_end_is_no_random_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed_inside(
        "    threading.excepthook = threading.__excepthook__ = show_of_thread\n",
        "    atexit.register(print, 'bye')\n",
        monkeypatch,
        tmp_path,
    )
    with Jail("untrusted", preload=[]) as jail:
        assert jail.run_python("print('text')").check().stdout == b"text\nbye\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preload": "json"}, "preload = 'json': a list of modules, not one text"),
        ({"stock": 1.5}, "stock = 1.5: a whole number from 0 to 64"),
        ({"stock": "2"}, "stock = '2': a whole number from 0 to 64"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=f"^{said}$"):
        Jail("untrusted", **given)


def test_a_job_can_be_killed_and_signalled(warm: Jail) -> None:
    process = warm.start_python("import time; time.sleep(60)")
    assert process.pid is not None and Path(f"/proc/{process.pid}").exists()
    process.kill()
    assert process.wait(5).verdict == "killed"
    handled = warm.start_python(
        "import signal, time\nsignal.signal(15, lambda *_: (print('got it'), exit(3)))\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)",
        stdout=nsjail_py.PIPE,
    )
    assert handled.stdout is not None
    assert handled.stdout.read(6) == b"ready\n"
    handled.terminate()
    result = handled.communicate()
    assert (result.exit_code, result.stdout) == (3, b"got it\n")


def test_a_large_source_and_many_threads_at_once(warm: Jail) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(10):
            result = warm.run_python(
                f"x = '{'x' * (200_000 if turn == 5 else 0)}'\nimport sys; print({number}, {turn}, sys.stdin.read())", input=b"in"
            )
            if result.stdout != f"{number} {turn} in\n".encode():
                wrong.append(result)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_killed_template_is_replaced() -> None:
    with Jail("untrusted", preload=[]) as jail:
        assert jail.run_python("print(1)").ok
        [init] = [int(c) for c in Path(f"/proc/{launcher.current().pid}/task/{launcher.current().pid}/children").read_text().split()][-1:]
        os.kill(init, signal.SIGKILL)
        assert jail._templates and jail._templates._current
        while jail._templates._current.alive:
            time.sleep(0.01)
        assert jail.run_python("print(2)").stdout == b"2\n"


def template_of(pid: int) -> int:
    """The last that this launcher has made."""
    init = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1]
    return int(Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])


def test_a_stopped_template_holds_up_neither_its_own_jobs_nor_others() -> None:
    """Not even when it has been told of more jobs than a socket can hold."""
    with Jail("untrusted", preload=[], stock=0) as jail:
        jail.run_python("1").check()
        os.kill(template := template_of(launcher.current().pid), signal.SIGSTOP)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                jail.run_python("1", timeout=0.2)
            waiting = [jail.start_python("1") for _ in range(450)]
            assert nsjail_py.run(["/bin/true"], timeout=20 * PATIENCE).ok
            for process in waiting:
                process.kill()
                with contextlib.suppress(SetupError):  # for those that it could not be told any more
                    assert process.wait(timeout=20 * PATIENCE).verdict == "killed"
        finally:
            os.kill(template, signal.SIGCONT)
    assert Jail("untrusted", preload=[]).run_python("1").ok


def test_a_killed_launcher_is_replaced_and_so_is_its_template() -> None:
    with Jail("untrusted", preload=[]) as jail:
        assert jail.run_python("print(1)").ok
        os.kill(launcher.current().pid, signal.SIGKILL)
        time.sleep(0.1)
        assert jail.run_python("print(3)").stdout == b"3\n"


def test_a_spent_template_is_replaced_and_its_last_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsjail_py.warm.MOST_JOBS", 2)
    with Jail("untrusted", preload=[]) as jail:
        long = jail.start_python("import time; time.sleep(0.5); print('whole')", stdout=nsjail_py.PIPE)
        outputs = [jail.run_python("print(id(object()))").check().stdout for _ in range(4)]
        assert len(set(outputs)) > 1, "another generation has another address space"
        assert long.communicate().stdout == b"whole\n"


def current(jail: Jail) -> Template:
    assert jail._templates and jail._templates._current
    return jail._templates._current


def aged(jail: Jail, share: float) -> Template:
    """The template of this jail, when it has served for that share of its time."""
    jail.run_python("pass").check()
    current(jail).started -= share * nsjail_py.warm.OLDEST_S
    return current(jail)


def held_up(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Template], threading.Event]:
    """Templates that are begun from now on, and what they wait for until they start."""
    begun: list[Template] = []
    start, wait = threading.Event(), Template._wait

    def held(template: Template, said: int, own: Any) -> None:
        begun.append(template)
        start.wait(30 * PATIENCE)
        wait(template, said, own)

    monkeypatch.setattr(Template, "_wait", held)
    return begun, start


def made() -> None:
    """Waits for the next templates."""
    for thread in threading.enumerate():
        if thread.name == "jail-template":
            thread.join()


def test_an_old_template_is_replaced_however_few_jobs_it_had() -> None:
    with Jail("untrusted", preload=[], stock=0) as jail:
        old = aged(jail, 1)
        jail.run_python("pass").check()
        assert current(jail) is not old


@pytest.mark.parametrize("what", ["age", "jobs"])
def test_the_next_template_is_made_while_the_current_one_serves(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Jail("untrusted", preload=[], stock=0) as jail:
        old = aged(jail, 0.9 if what == "age" else 0)
        if what == "jobs":
            old.jobs = round(0.9 * nsjail_py.warm.MOST_JOBS)
        begun, start = held_up(monkeypatch)
        for _ in range(3):
            jail.run_python("pass").check()
        assert current(jail) is old
        start.set()
        made()
        assert begun == [current(jail)]
        jail.run_python("pass").check()


def test_a_next_template_that_cannot_be_made_is_told_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise SetupError("template", detail="no more of them")

    with Jail("untrusted", preload=[], stock=0) as jail:
        old = aged(jail, 0.9)
        monkeypatch.setattr(Template, "_wait", refused)
        for _ in range(3):
            jail.run_python("pass").check()
            made()
        old.started -= nsjail_py.warm.OLDEST_S
        with pytest.raises(SetupError, match="no more of them"):
            jail.run_python("pass")


def test_a_jail_that_is_closed_meanwhile_has_no_next_template(monkeypatch: pytest.MonkeyPatch) -> None:
    with Jail("untrusted", preload=[], stock=0) as jail:
        aged(jail, 0.9)
        begun, start = held_up(monkeypatch)
        jail.run_python("pass").check()
    start.set()
    made()
    assert jail._templates and jail._templates._current is None
    assert [template.close.alive for template in begun] == [False]


def plans_open() -> int:
    return sum(name.startswith("/memfd:plan") for name in _links("self"))


def test_a_template_that_has_ended_leaves_no_plan_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsjail_py.warm.MOST_JOBS", 4)
    with Jail("untrusted", preload=[]) as jail:
        before = plans_open()
        for _ in range(20):
            jail.run_python("pass").check()
        assert plans_open() <= before + 4, "those of the current template and of the next"
    made()
    assert plans_open() <= before


CLOSED = """
import ctypes, sys, time  # whose library may keep a file open
sys.path.insert(0, {tests!r})
import nsjail_py
from conftest import changes, settled, traces
before = settled()
with nsjail_py.Jail("untrusted", preload=["json"], stock=2) as jail:
    for _ in range(5): jail.run_python("print(1)").check()
    running = jail.start_python("import time; time.sleep(60)")
    time.sleep(0.1)
print(running.wait(5).verdict)
deadline = time.monotonic() + {seconds}
while (more := changes(before, traces())) and time.monotonic() < deadline: time.sleep(0.01)
print(more or "nothing")
"""


def test_a_closed_jail_ends_its_jobs_and_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSED.format(tests=str(Path(__file__).parent), seconds=5 * PATIENCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "killed\nnothing\n", done.stdout + done.stderr


@pytest.mark.parametrize("preload", [None, []])
def test_a_closed_jail_starts_nothing(preload: list[str] | None) -> None:
    with Jail("untrusted", preload=preload) as jail:
        jail.run_python("pass").check()
    for start in (lambda: jail.run(["/bin/true"]), lambda: jail.run_python("pass"), lambda: jail.start(["/bin/true"]), jail.session):
        with pytest.raises(JailError, match="closed"):
            start()
    jail.close()


def until_closed(start: Callable[[int], object], jail: Jail) -> list[bool]:
    """Whether each of a few threads that start and start, while the jail is closed, was told so."""

    def told(thread: int) -> bool:
        with contextlib.suppress(JailError):
            for number in range(30):
                start(100 * thread + number)
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(told, thread) for thread in range(3)]
        time.sleep(0.2)
        jail.close()
        return [answer.result() for answer in answers]


def test_runs_that_are_on_their_way_bring_no_closed_jail_back_to_life() -> None:
    jail = Jail("untrusted", preload=[])
    assert all(until_closed(lambda _: jail.run_python("import time; time.sleep(0.05)"), jail))
    assert jail._templates and jail._templates._current is None


def test_sessions_that_are_on_their_way_do_not_either() -> None:
    jail = Jail("untrusted")
    assert all(until_closed(lambda number: jail.session(lifetime=60.0 + number).close(), jail))


@pytest.mark.parametrize(
    ("preload", "said"),
    [
        (["no_such_module"], "no installed distribution brings 'no_such_module'"),
        (["json.no_such_part"], "No module named 'json.no_such_part'"),
    ],
)
def test_what_cannot_be_preloaded_is_told(preload: list[str], said: str) -> None:
    with pytest.raises(JailError, match=said), Jail("untrusted", preload=preload) as jail:
        jail.run_python("print(1)")


def test_a_policy_without_what_a_waiting_job_calls_is_told() -> None:
    syscalls = nsjail_py.policy("untrusted").syscalls
    assert syscalls
    for name in ("sendmsg", "prlimit64"):
        with pytest.raises(PolicyError, match=f"the jobs of a warm interpreter need the system calls {name}$"):
            Jail("untrusted", syscalls=replace(syscalls, deny=(name,)), preload=[]).run_python("print(1)")


def changed_inside(behind: str, added: str, monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """From now on what a template runs has this behind those lines."""
    here = nsjail_py.warm.HERE
    text = (here / "warm_inside.py").read_text()
    assert behind in text
    (top / "warm_inside.py").write_text(text.replace(behind, behind + added))
    (top / "_template.abi3.so").symlink_to(here / "_template.abi3.so")
    monkeypatch.setattr(nsjail_py.warm, "HERE", top)


def opening(path: str, monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """From now on the modules of a template open this (an expression) and keep it open."""
    changed_inside("    rehearse()\n    rehearse_failure()\n", f"    os.open({path}, os.O_RDONLY)\n", monkeypatch, top)


def test_a_library_that_holds_its_own_file_open_has_it_in_each_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As libffi does from 3.5 on. The program's own descriptors have the numbers that they always have."""
    opening("next(line.split()[-1] for line in open('/proc/self/maps') if 'r-xp' in line and 'libc' in line)", monkeypatch, tmp_path)
    read, write = os.pipe()
    look = "import os\nfor n in range(3, 1100):\n  try: print(n, os.path.basename(os.readlink(f'/proc/self/fd/{n}'))[:4])\n  except OSError: pass"
    with Jail("untrusted", preload=[]) as jail:
        for _ in range(2):
            told = jail.run_python(look, pass_fds=[write]).check().stdout.decode().splitlines()
            assert len(told) == 2
            assert told[0] == f"{write} pipe"
            assert int(told[1].split()[0]) >= 1000
            assert told[1].endswith(" libc")
    os.close(read)
    os.close(write)


def test_any_other_descriptor_that_a_module_leaves_open_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opening("'/etc/ld.so.cache'", monkeypatch, tmp_path)
    with pytest.raises(JailError, match=r"leave descriptors open: /etc/ld\.so\.cache"), Jail("untrusted", preload=[]) as jail:
        jail.run_python("print(1)")


def test_a_policy_that_shows_files_of_the_host_has_no_warm_interpreter(tmp_path: Path) -> None:
    with (
        pytest.raises(PolicyError, match="shows files of the host"),
        Jail("untrusted", preload=[], mounts=[Mount(source=str(tmp_path), target="/x")]) as jail,
    ):
        jail.run_python("print(1)")


@pytest.mark.parametrize(("aslr", "layouts"), [("shared", 1), ("fresh", 3)])
def test_jobs_have_the_address_layout_that_the_policy_says(aslr: str, layouts: int) -> None:
    """Where the C library lies. `fresh` is an exec for each run, which has what was to be preloaded all the same."""
    policy = nsjail_py.policy("untrusted")
    source = "import json, sys; print(next(l for l in open('/proc/self/maps') if 'libc' in l).split('-')[0])"
    with Jail(replace(policy, python=replace(policy.python, aslr=aslr)), preload=["numpy"]) as jail:
        assert len({jail.run_python(source).check().stdout for _ in range(3)}) == layouts
        assert jail.run_python("import numpy; print(numpy.arange(4).sum())").check().stdout == b"6\n"


def test_many_jobs_at_once_are_not_refused_a_process() -> None:
    """Each has a process 1 of its own, and where no control group counts the kernel counts them all for one user."""
    with Jail("untrusted", preload=[]) as jail, ThreadPoolExecutor(24) as pool:
        verdicts = {result.summary for result in pool.map(jail.run_python, ["import time; time.sleep(1)"] * 24)}
    assert verdicts == {"ok: the program exited with 0"}


ON_THE_WAY = """
import socket, sys
pairs = [socket.socketpair() for _ in range(2)]
for ours, _ in pairs: socket.send_fds(ours, [b'x'], [0] * 250)
print('sent', flush=True)
sys.stdin.read()
"""


def test_descriptors_that_a_job_keeps_on_their_way_cost_no_other_job() -> None:
    """The kernel counts them for the user that all jobs of a template are, and refuses whoever is above its own limit of open files."""
    with Jail("untrusted", preload=[], stock=0) as jail, jail.start_python(ON_THE_WAY, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"sent\n"
        for _ in range(3):
            jail.run_python("import resource; assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, 256)").check()


GIVES = """
import array, os, socket
launcher = socket.socket(fileno=os.dup(999))
for _ in range(20):
    launcher.sendmsg([bytes(64)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))])
"""


@pytest.mark.skipif(not IS_ROOT, reason="only root sees what the launcher has open")
def test_descriptors_that_a_preloaded_module_sends_to_the_launcher_are_not_kept(
    own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two where there is room for one: the kernel rounds the room up. The messages have the size of native/ladder.h's."""
    (tmp_path / "gives-1.dist-info").mkdir()
    (tmp_path / "gives-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: gives\nVersion: 1\n")
    (tmp_path / "gives-1.dist-info/RECORD").write_text("gives.py,,\ngives-1.dist-info/METADATA,,\ngives-1.dist-info/RECORD,,\n")
    (tmp_path / "gives.py").write_text(GIVES)
    found = interpreter.inspect()._replace(search=(str(tmp_path),))
    monkeypatch.setattr(interpreter, "inspect", lambda path: found)
    monkeypatch.syspath_prepend(str(tmp_path))
    nsjail_py.run_python("pass").check()
    held = Path(f"/proc/{launcher.current().pid}/fd")
    before = len(list(held.iterdir()))
    with Jail("untrusted", preload=["gives"], stock=0) as jail, contextlib.suppress(SetupError):
        jail.run_python("pass")
    assert len(list(held.iterdir())) < before + 10
