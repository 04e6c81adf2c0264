"""Sessions: one jailed interpreter between cells, its limits, and the way back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE

import nsjail_py
from nsjail_py import Jail, JobError, LauncherDied, PolicyError, Session, SessionError, SetupError, Verdict


def test_a_session_and_its_checkpoints_leave_nothing(leaves_nothing: None) -> None:
    with Jail("untrusted") as jail:
        with jail.session() as session:
            for _ in range(5):
                session.run("x = bytearray(1 << 20)")
                session.checkpoint()
            session.run("import os; os._exit(1)")
        assert session.result is not None and session.result.verdict is Verdict.killed


@pytest.fixture(scope="module", params=["cold", "warm"])
def jail(request: pytest.FixtureRequest) -> Iterator[Jail]:
    preload = ["numpy", "matplotlib"] if request.param == "warm" else None
    with Jail("untrusted", preload=preload, imports=["numpy", "matplotlib"], wall_time=10.0 * PATIENCE) as jail:
        yield jail


@pytest.fixture
def session(jail: Jail) -> Iterator[Session]:
    with jail.session() as session:
        yield session


def test_what_a_cell_defines_the_next_one_has(session: Session) -> None:
    session.run("import math\ndef area(r): return math.pi * r * r\nx = 2").check()
    assert session.run("x += 1; area(x)").check().value == "28.274333882308138"
    assert session.run("x = 5").check().value is None


def test_what_a_cell_prints_is_its_own(session: Session) -> None:
    first = session.run("import sys\nprint('out'); print('err', file=sys.stderr)")
    second = session.run("print('x' * 200_000)")
    assert (first.stdout, first.stderr) == (b"out\n", b"err\n")
    assert (len(second.stdout), second.stderr) == (200_001, b"")


def test_an_exception_is_told_with_the_cells_own_lines_and_ends_nothing(session: Session) -> None:
    session.run("def f(x):\n    return 1 / x")
    cell = session.run("y = 7\nf(0)")
    assert (cell.verdict, cell.evidence) == (Verdict.exit, {"exception": "ZeroDivisionError"})
    assert cell.error and [line.strip() for line in cell.error[2].splitlines() if "cell" in line or "return" in line] == [
        'File "<cell 2>", line 2, in <module>',
        'File "<cell 1>", line 2, in f',
        "return 1 / x",
    ]
    with pytest.raises(JobError, match="division by zero"):
        cell.check()
    wrong = session.run("x = = 1")
    assert wrong.error and wrong.error[0] == "SyntaxError" and "x = = 1" in wrong.error[2]
    assert session.run("import sys; sys.exit(3)").evidence == {"exception": "SystemExit"}
    assert session.run("y").value == "7"


FORKS = {
    "goes on": ("child = os.fork() == 0; 'fork'", 0, b""),
    "exits": ("if os.fork() == 0: sys.exit(3)\n'fork'", 3, b""),
    "exits with a text": ("if os.fork() == 0: sys.exit('why')\n'fork'", 1, b"why\n"),
    "fails": ("if os.fork() == 0: 1 / 0\n'fork'", 1, b"ZeroDivisionError: division by zero\n"),
    "is interrupted": ("if os.fork() == 0: raise KeyboardInterrupt\n'fork'", -signal.SIGINT, b"KeyboardInterrupt\n"),
    "prints": ("if os.fork() == 0: print('told', file=sys.stderr)\n'fork'", 0, b"told\n"),
    "runs what is for its end": ("if os.fork() == 0:\n import atexit\n atexit.register(os.write, 2, b'bye')\n'fork'", 0, b"bye"),
}


@pytest.mark.parametrize("how", FORKS)
def test_what_a_cell_forks_ends_with_the_cell_as_in_any_interpreter_and_answers_nothing(how: str, session: Session) -> None:
    code, status, said = FORKS[how]
    session.run("import os, sys, time").check()
    session.checkpoint()
    first = session.run(code).check()
    waited = session.run("time.sleep(.1); os.waitstatus_to_exitcode(os.wait()[1])").check()
    assert (first.value, waited.value) == ("'fork'", str(status))
    assert (first.stderr + waited.stderr).endswith(said)
    assert [session.run(f"{number}").check().value for number in range(4)] == ["0", "1", "2", "3"]
    session.restore()
    assert session.run("5").check().value == "5"


def test_a_cell_that_ends_and_leaves_a_child_is_not_waited_for_to_its_limit(session: Session) -> None:
    begin = time.monotonic()
    cell = session.run("import os, time\nif os.fork() == 0: time.sleep(60)\nos._exit(3)")
    assert cell.evidence == {"exit_code": 3}
    assert time.monotonic() - begin < 5 * PATIENCE


THEN: dict[str, Callable[[Session], object]] = {"run": lambda session: session.run("1"), "checkpoint": lambda session: session.checkpoint()}


@pytest.mark.parametrize("then", THEN)
def test_an_answer_that_a_cell_has_forged_is_never_taken_for_another_command_s(then: str, session: Session) -> None:
    """It knows all that is to be said; but ours comes as well."""
    session.run(
        "import gc, json, os, socket\n"
        "worker = next(one for one in gc.get_objects() if type(one).__name__ == 'Worker')\n"
        "def forge(number):\n"
        " text = json.dumps({'value': 'forged', 'number': number}).encode()\n"
        " os.write(worker.control.fileno(), len(text).to_bytes(8, 'little') + bytes(8) + text)"
    ).check()
    assert session.run("forge(2)").value == "forged"
    with pytest.raises(SessionError, match="has ended"):
        THEN[then](session)


TEXTS = {
    "half a surrogate": (r"'bad \ud83d'", r"bad \ud83d"),
    "beyond 16 bits": (r"'\U0001f600' * (1 << 20)", "\U0001f600" * (1 << 18)),
    "no letters": (r"'\0' * (2 << 20)", "\0" * (1 << 20)),
}


@pytest.mark.parametrize("what", TEXTS)
def test_any_text_is_told_as_far_as_it_can_be(what: str, session: Session) -> None:
    text, told = TEXTS[what]
    session.run(f"class Odd:\n def __repr__(self): return text\ntext = {text}").check()
    assert session.run("Odd()").check().value == told
    cell = session.run("raise ValueError(text)")
    assert cell.error and cell.error[:2] == ("ValueError", told)


@pytest.mark.parametrize("error", ["KeyError", "SystemExit", "KeyboardInterrupt"])
def test_an_exception_without_a_text_ends_nothing(error: str, session: Session) -> None:
    cell = session.run(f"class Odd(Exception):\n def __str__(self): raise {error}\nraise Odd")
    assert cell.error and cell.error[0] == "Odd"
    assert session.run("1").check().value == "1"


def test_a_checkpoint_is_gone_back_to_as_often_as_wanted(session: Session) -> None:
    session.run("x = [1]")
    first = session.checkpoint()
    session.run("x.append(2)")
    second = session.checkpoint()
    session.run("x.append(3)")
    for number, value in ((second, "[1, 2]"), (first, "[1]"), (second, "[1, 2]"), (-1, "[1, 2]")):
        session.restore(number)
        assert session.run("x").value == value
        session.run("x.append('gone')")
    with pytest.raises(SessionError, match="no checkpoint 2"):
        session.restore(2)
    assert session.run("x").value == "[1, 2, 'gone']"


RUNNING = {
    "a thread": ("import threading, time\nthread = threading.Thread(target=time.sleep, args=(30,), daemon=True)\nthread.start()", 1),
    "a pool": ("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\nsum(pool.map(abs, range(9)))", None),
    "one that Python keeps no account of": ("import _thread, time\n_thread.start_new_thread(time.sleep, (30,))", 1),
}


@pytest.mark.parametrize("what", RUNNING)
def test_a_state_with_threads_is_no_checkpoint_and_goes_on(what: str, session: Session) -> None:
    code, count = RUNNING[what]
    session.run(f"x = 1\n{code}").check()
    for _ in range(2):
        with pytest.raises(SessionError, match=f"has no threads, and the state has {count or '[12]'} beside"):
            session.checkpoint()
    if what == "a pool":
        assert session.run("pool.submit(abs, -2).result()").check().value == "2"
        session.run("pool.shutdown()").check()
        session.checkpoint()
        session.run("x = 2").check()
        session.restore()
    cell = session.run("x").check()
    assert (cell.value, cell.stderr) == ("1", b"")


def test_threads_that_have_ended_and_those_of_numpy_are_in_the_way_of_no_checkpoint(session: Session) -> None:
    session.run("import threading, numpy\na = numpy.ones((300, 300))").check()
    for _ in range(20):
        session.run("a @ a\nthread = threading.Thread(target=abs, args=(1,)); thread.start(); thread.join()").check()
        session.checkpoint()
    session.run("a @ a").check()
    session.restore()
    assert session.run("(a @ a)[0, 0]").check().value in ("300.0", "np.float64(300.0)")


def test_a_checkpoint_has_the_random_numbers_that_were_to_come(session: Session) -> None:
    import random

    session.run("import random; random.seed(42); random.gauss(0, 1)").check()
    random.seed(42)
    random.gauss(0, 1)
    numbers = [random.gauss(0, 1), random.random()]
    session.checkpoint()
    for _ in range(2):
        assert session.run("[random.gauss(0, 1), random.random()]").check().value == str(numbers)
        session.restore()


def test_no_signal_wakes_what_a_checkpoint_keeps(session: Session) -> None:
    session.run("import os, signal, time\nx = 1\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(3))\nsignal.setitimer(0, 0.2)").check()
    session.checkpoint()
    time.sleep(0.4 * PATIENCE)
    session.restore()
    assert session.run("x, signal.pthread_sigmask(0, ())").check().value == "(1, set())"
    assert session.run("signal.setitimer(0, 0.05); time.sleep(5)").evidence == {"exit_code": 3}


DEADLY = {
    "processor time": ("while True: pass", {"cpu_time": 0.2}, Verdict.cpu_time),
    "wall time": ("import time; time.sleep(30)", {"wall_time": 0.2}, Verdict.wall_time),
    "a signal": ("import os; os.kill(os.getpid(), 11)", {}, Verdict.signal),
    "an exit": ("import os; os._exit(3)", {}, Verdict.exit),
    "output": ("import os\nwhile True: os.write(1, bytes(60000))", {}, Verdict.output),
}


@pytest.mark.parametrize("how", DEADLY)
def test_a_cell_that_ends_the_interpreter_says_why_and_a_checkpoint_is_still_there(how: str, session: Session) -> None:
    code, limits, verdict = DEADLY[how]
    session.run("x = 1")
    session.checkpoint()
    cell = session.run("x = 2\n" + code, **limits)  # type: ignore[arg-type]
    assert cell.verdict is verdict, cell
    assert len(cell.stdout) <= 16 << 20
    with pytest.raises(SessionError, match=str(verdict)):
        cell.check()
    with pytest.raises(SessionError, match=str(verdict)):
        session.run("x")
    session.restore()
    assert session.run("x").value == "1"


def test_without_a_checkpoint_the_next_call_says_that_the_state_is_gone(session: Session) -> None:
    assert session.run("import os; os.abort()").evidence == {"signal": signal.SIGABRT}
    with pytest.raises(SessionError, match="signal"):
        session.run("1")
    with pytest.raises(SessionError, match=r"there is no checkpoint$"):
        session.restore()


HUNGRY = "y = bytearray(b'1') * (300 << 20)"


@pytest.mark.parametrize("preload", [None, []], ids=["cold", "warm"])
def test_a_cell_for_which_memory_runs_out_says_so(preload: list[str] | None) -> None:
    with Jail("untrusted", memory="128M", preload=preload, wall_time=10.0 * PATIENCE) as jail, jail.session() as session:
        session.run("x = 1").check()
        session.checkpoint()
        try:
            cell = session.run(HUNGRY)
        except SessionError:  # version 2 ends the whole group
            assert session.result and session.result.verdict is Verdict.memory
            return
        if cell.error:  # without a group the kernel refuses the memory
            assert cell.error[0] == "MemoryError"
            return
        assert cell.verdict is Verdict.memory and cell.evidence["limit"] == 128 << 20 and cell.evidence["oom_kills"] == 1
        with pytest.raises(SessionError, match="memory"):
            session.run("x")
        session.restore()
        assert session.run("x").check().value == "1"
        session.run("import os, signal")
        assert session.run("os.kill(os.getpid(), signal.SIGKILL)").evidence == {"signal": signal.SIGKILL}


def test_a_checkpoint_that_the_want_of_memory_has_cost_is_told_by_the_cell_that_wanted_it() -> None:
    with Jail("untrusted", memory="128M", wall_time=10.0 * PATIENCE) as jail, jail.session() as session:
        session.run("x = 1").check()
        session.checkpoint()
        if (
            session.run(f"try: {HUNGRY.replace('300', '90')}\nexcept MemoryError: y = None").check()
            and session.run("y is None").value == "True"
        ):
            return  # no group: the kernel refuses the memory
        session.checkpoint()
        try:
            cell = session.run("del y\nz = bytearray(b'1') * (100 << 20)\n'alive'")
        except SessionError:
            assert session.result and session.result.verdict is Verdict.memory
            return
        assert (cell.verdict, cell.value) == (Verdict.memory, "'alive'")
        assert cell.evidence["checkpoints"] == [1]
        assert session.run("len(z) >> 20").check().value == "100"
        with pytest.raises(SessionError, match="checkpoint 1 has ended"):
            session.restore(1)
        session.restore(0)
        assert session.run("x").check().value == "1"


def test_a_cell_that_closes_the_session_s_own_socket_is_told_so_and_a_checkpoint_is_still_there(session: Session) -> None:
    session.run("x, y = 1, 1").check()
    session.checkpoint()
    for then in ("", "\nimport time\ntime.sleep(30)"):
        cell = session.run(f"import os\nos.closerange(3, 50){then}")
        assert (cell.verdict, cell.evidence) == (Verdict.exit, {"closed": "the socket on which the session answers"})
        session.restore()
    assert session.run("x").check().value == "1"


def test_a_cell_that_was_ended_has_the_times_that_were_measured(session: Session) -> None:
    cell = session.run("while True: pass", wall_time=0.3)
    assert cell.wall_time == cell.evidence["observed"] >= 0.3 and cell.cpu_time > 0
    assert cell.wall_time < 5 * PATIENCE


STRAYS = {
    "a child": "while True: beat()",
    "a session of its own": "os.setsid()\n while True: beat()",
    "one that forks without end": "while True:\n  beat()\n  if os.fork(): os._exit(0)",
    "one that ignores signals": "for n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\n while True: beat()",
}


@pytest.mark.parametrize("what", STRAYS)
@pytest.mark.parametrize("end", ["a limit", "an exit", "restore"])
def test_what_a_cell_leaves_running_goes_with_its_state(end: str, what: str, session: Session) -> None:
    session.run("import os, signal, time\ndef beat(): open('beat', 'w').write(str(time.monotonic())); time.sleep(.005)").check()
    session.checkpoint()
    then = {"a limit": "time.sleep(60)", "an exit": "os._exit(3)", "restore": "pass"}[end]
    begun = "while not os.path.exists('beat'): time.sleep(.01)"
    session.run(f"if os.fork() == 0:\n {STRAYS[what]}\n{begun}\n{then}", wall_time=(0.5 if end == "a limit" else 10) * PATIENCE)
    if end == "restore":
        session.restore()
    beat = session.get("beat")
    time.sleep(0.1)
    assert session.get("beat") == beat
    session.restore()
    assert session.run("os.path.exists('beat')").check().value == "True"


def test_what_cells_have_left_is_in_the_way_of_no_later_checkpoint() -> None:
    with Jail("untrusted", processes=8) as jail, jail.session() as session:
        session.run("import os, time").check()
        session.checkpoint()
        assert session.run("for _ in range(20):\n if os.fork() == 0: time.sleep(1000)").error[0] == "BlockingIOError"  # type: ignore[index]
        with pytest.raises(SessionError, match="no process is left"):
            session.checkpoint()
        for _ in range(3):
            session.restore()
            session.run("if os.fork() == 0: time.sleep(1000)").check()
            session.checkpoint()


@pytest.mark.parametrize("call", ["run", "checkpoint"])
def test_a_state_that_ends_between_two_cells_takes_no_checkpoint_with_it(call: str, session: Session) -> None:
    session.run("x = 1")
    session.checkpoint()
    session.run("import os, threading; threading.Timer(.2, os._exit, (3,)).start()").check()
    time.sleep(0.5 * PATIENCE)
    if call == "run":
        assert session.run("x").evidence == {"exit_code": 3}
    for again in (session.checkpoint, lambda: session.run("x")):
        with pytest.raises(SessionError, match=r"gone \(exit {'exit_code': 3}\)"):
            again()
    session.put("file", b"still there")
    session.restore()
    assert session.run("x, open('file').read()").check().value == "(1, 'still there')"


def test_a_checkpoint_that_has_ended_takes_no_state_with_it(session: Session) -> None:
    session.checkpoint()
    session.run("x = 1; import os; os.kill(os.getppid(), 9)").check()
    with pytest.raises(SessionError, match="checkpoint 0 has ended"):
        session.restore(0)
    assert session.run("x").check().value == "1"
    session.checkpoint()
    session.run("x = 2")
    session.restore()
    assert session.run("x").check().value == "1"


def test_files_go_in_and_out(session: Session) -> None:
    data = os.urandom(5 << 20)
    session.put("data.bin", data)
    assert session.run("d = open('/work/data.bin', 'rb').read(); open('back', 'wb').write(d[::-1]); len(d)").check().value == str(5 << 20)
    assert session.get("back") == data[::-1]
    session.run("import os; os.mkfifo('pipe'); os.symlink('/etc/passwd', 'link')")
    for path in ("missing", "pipe", "/work", "/proc/self/nothing"):
        with pytest.raises(OSError):
            session.get(path)
    with pytest.raises(OSError):
        session.put("/usr/lib/x", b"")
    assert session.run("1 + 1").value == "2"


WRONG: dict[str, Callable[[Any], object]] = {
    "text as data": lambda session: session.put("a", "text"),
    "a NUL in a name": lambda session: session.get("a\0b"),
    "half a surrogate in a name": lambda session: session.put("\ud800", b""),
    "half a surrogate in code": lambda session: session.run("'\ud800'"),
    "bytes as code": lambda session: session.run(b"1"),
    "no end": lambda session: session.run("1", wall_time=float("inf")),
    "no number": lambda session: session.run("1", cpu_time=float("nan")),
    "less than nothing": lambda session: session.run("1", wall_time=-1),
    "text as a limit": lambda session: session.run("1", wall_time="1"),
    "text as a checkpoint": lambda session: session.restore("x"),
    "a giant checkpoint": lambda session: session.restore(10**30),
    "too much": lambda session: session.put("a", bytes((64 << 20) + 1)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_bad_argument_is_an_error_and_not_the_end(what: str, session: Session) -> None:
    session.run("x = 1").check()
    with pytest.raises((TypeError, ValueError, OverflowError, AttributeError, SessionError)):
        WRONG[what](session)
    assert session.run("x", wall_time=1e300, cpu_time=1e300).check().value == "1"


def test_a_file_goes_in_whole_while_a_thread_writes_more_than_it_may() -> None:
    with Jail("untrusted", output="1M") as jail, jail.session() as session:
        session.run("import os, threading, time\ndef flood():\n time.sleep(.2)\n for _ in range(700): os.write(1, bytes(60_000))")
        session.run("threading.Thread(target=flood).start()").check()
        time.sleep(0.4 * PATIENCE)
        data = os.urandom(48 << 20)
        session.put("file", data)
        assert session.get("file") == data


def test_a_file_goes_in_and_out_in_parts_for_which_memory_need_not_have_room_twice() -> None:
    with Jail("untrusted", memory="64M", disk="200M", wall_time=10.0 * PATIENCE) as jail, jail.session() as session:
        session.run("x = 1").check()
        session.checkpoint()
        with pytest.raises(ValueError, match=f"{(64 << 20) + 1} bytes: at most {64 << 20}"):
            session.put("larger than memory", bytes((64 << 20) + 1))
        data = os.urandom(28 << 20)
        session.put("file", data)
        assert session.get("file") == data
        session.restore()
        assert session.run("x, open('/proc/self/stat').read() > ''").check().value == "(1, True)"


def test_a_file_for_which_the_disk_has_no_room_is_an_error_and_a_file_whose_size_nobody_knows_comes_whole() -> None:
    with Jail("untrusted", disk="4M") as jail, jail.session() as session:
        with pytest.raises(OSError, match="No space left"):
            session.put("file", bytes(9 << 20))
        session.put("file", b"small")
        assert session.get("file") == b"small"
        assert session.get("/proc/self/status").startswith(b"Name:")
        session.run("open('large', 'wb').truncate((64 << 20) + 1)")
        with pytest.raises(OSError, match="File too large"):
            session.get("large")


def test_a_path_and_any_buffer_will_do(session: Session) -> None:
    session.put(Path("a"), memoryview(b"data"))
    assert session.get(Path("/work/a")) == b"data"


def test_figures_come_as_pictures(session: Session) -> None:
    cell = session.run("import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.figure()\nplt.plot([2, 1])\nNone").check()
    assert len(cell.figures) == 2 and all(picture.startswith(b"\x89PNG") and len(picture) > 2000 for picture in cell.figures)
    assert session.run("plt.get_fignums()").figures == ()


def test_a_figure_that_cannot_be_drawn_is_the_error_of_its_own_cell_and_of_no_later_one(session: Session) -> None:
    cell = session.run("import matplotlib.pyplot as plt\nplt.plot([1])\nplt.figure()\nplt.title('$x^{$')\n1")
    assert (cell.verdict, cell.error and cell.error[0], len(cell.figures)) == (Verdict.exit, "ValueError", 1)
    assert session.run("2").check().value == "2"


def test_figures_beyond_what_is_told_are_an_error_of_the_cell() -> None:
    plotting = "import sys, types\nsys.modules['matplotlib.pyplot'] = pyplot = types.SimpleNamespace(get_fignums=lambda: [1], close=id)\n"
    figure = "class Figure:\n def savefig(self, file, format): file.write(bytes(129 << 20))\npyplot.figure = lambda number: Figure()"
    with Jail("untrusted", memory="1G") as jail, jail.session() as session:
        cell = session.run(plotting + figure)
        assert cell.error and cell.error[:2] == ("ValueError", "the figures of a cell are at most 128 MiB")
        session.run("del sys.modules['matplotlib.pyplot']").check()
        assert session.run("1").check().value == "1"


@pytest.mark.parametrize("how", ["import sys; sys.stdout = None", "import os; os.close(1)", "import sys; sys.stdout.close()"])
def test_a_cell_that_gives_its_output_away_costs_no_later_cell_its_value(how: str, session: Session) -> None:
    session.run(how).check()
    session.run("print('lost')")
    assert session.run("1 + 1").check().value == "2"


def test_an_interrupt_is_a_keyboard_interrupt_for_the_cell(session: Session) -> None:
    timer = threading.Timer(0.3 * PATIENCE, session.interrupt)
    timer.start()
    cell = session.run("x = 4\nimport time\nwhile True: time.sleep(0.01)")
    assert cell.error and cell.error[0] == "KeyboardInterrupt"
    assert session.run("x").value == "4"


def test_an_interrupt_that_comes_too_late_or_twice_costs_nothing(session: Session) -> None:
    session.run("x = 4").check()
    for _ in range(20):
        session.interrupt()
    time.sleep(0.3 * PATIENCE)  # they are on their way, and would be in time for the next cell
    assert session.run("x").check().value == "4"
    session.checkpoint()
    session.interrupt()
    timers = [threading.Timer(0.3 * PATIENCE + 0.0005 * number, session.interrupt) for number in range(40)]
    for timer in timers:
        timer.start()
    cell = session.run("import time\nwhile True: time.sleep(0.01)")
    assert cell.error and cell.error[0] == "KeyboardInterrupt"
    for timer in timers:
        timer.join()
    time.sleep(0.3 * PATIENCE)
    assert session.run("x").check().value == "4"
    session.restore()
    assert session.run("x").check().value == "4"


def test_a_cells_own_handler_of_interrupts_is_kept(session: Session) -> None:
    session.run("import signal, time\nseen = []\nsignal.signal(2, lambda *_: seen.append(1))").check()
    threading.Timer(0.3 * PATIENCE, session.interrupt).start()
    assert session.run("while not seen: time.sleep(0.01)\nseen").check().value == "[1]"


def test_a_session_is_jailed_as_its_policy_says(session: Session) -> None:
    assert session.run("import socket\nsocket.socket()").error[0] == "PermissionError"  # type: ignore[index]
    assert session.run("import os\nos.execv('/proc/self/exe', ['x'])").error[0] == "PermissionError"  # type: ignore[index]
    assert session.run("open('/etc/shadow')").error[0] == "FileNotFoundError"  # type: ignore[index]


LIES = {
    "no message": "os.write(fd, b'x' * 100)",
    "a giant": "os.write(fd, (1 << 60).to_bytes(8, 'little') * 2)",
    "a dead keeper": "os.kill(os.getppid(), 9)",
    "a stopped keeper": "os.kill(os.getppid(), 19); import time; time.sleep(20)",
    "nothing more": "os.close(fd)",
}
SAID = [
    "{{{{{{",
    "[" * 100_000,
    "[1]",
    '{"value": 1, "figures": [-5]}',
    '{"died": "wall_time"}',
    '{"died": "wall_time", "observed": null}',
    '{"died": "lunch"}',
    '{"died": "ended", "status": 127}',
    '{"gone": true, "status": 1%s}' % ("0" * 30),
    '{"errno": 1%s}' % ("0" * 30),
    '{"errno": 5}',
    '{"wall": 1e999}',
    '{"value": "\\ud83d"}',
    '{"error": ["a", "b"]}',
]
NUMBER = '{"number": 1, '
"""It answers what was asked."""
LIES |= {
    said[:40]: f"t = {said.replace('{', NUMBER, 1).encode()!r}; os.write(fd, len(t).to_bytes(8, 'little') + bytes(8) + t)" for said in SAID
}


@pytest.mark.parametrize("what", LIES)
def test_a_cell_that_attacks_its_keeper_ends_the_session_with_an_error(what: str, session: Session) -> None:
    """And the caller gets no exception but SessionError, and never waits for longer than the cell's limit."""
    code = LIES[what]
    begin = time.monotonic()
    attack = f"import os\nfor fd in range(3, 20):\n  try: os.fstat(fd)\n  except OSError: continue\n  {code}\n  break"
    try:
        cell = session.run(attack, wall_time=1.0)
        assert cell.verdict in (Verdict.ok, Verdict.signal, Verdict.exit, Verdict.wall_time)
        session.run("1", wall_time=1.0)
    except SessionError:
        pass
    assert time.monotonic() - begin < 8 * PATIENCE
    session.close()
    with pytest.raises(SessionError, match="ended"):
        session.run("1")


def test_a_cell_cannot_say_what_is_the_keepers_to_say(session: Session) -> None:
    said = {
        "number": 1,
        "died": "cpu_time",
        "gone": True,
        "status": 9,
        "errno": 5,
        "threads": 3,
        "unknown": True,
        "more": True,
        "value": "mine",
    }
    text = json.dumps(said).encode()
    attack = "import gc, os\nworker = next(one for one in gc.get_objects() if type(one).__name__ == 'Worker')\nos.write(worker.control.fileno(), "
    cell = session.run(f"{attack}{len(text).to_bytes(8, 'little') + bytes(8) + text!r})")
    assert (cell.verdict, cell.evidence, cell.value) == (Verdict.ok, {}, "mine")


def test_a_session_that_ends_by_itself_says_what_it_ended_with(session: Session) -> None:
    with pytest.raises(SessionError, match=r"the session has ended: .*signal"):
        session.run(f"import os, time; os.kill(os.getppid(), {signal.SIGSEGV}); time.sleep(5)")
    assert session.result is not None
    assert (session.result.verdict, session.result.evidence) == (Verdict.signal, {"signal": signal.SIGSEGV})
    with pytest.raises(SessionError, match="signal"):
        session.run("1")


def test_a_session_whose_jail_cannot_be_made_says_why_as_a_run_does() -> None:
    mounts = [nsjail_py.Mount(source="/etc/hostname", target="/usr/nothing/here")]
    with Jail("untrusted", root="system", mounts=mounts) as jail:
        with pytest.raises(SetupError, match="/usr/nothing/here") as caught:
            jail.session()
        with pytest.raises(SetupError) as of_a_run:
            jail.run_python("pass")
    assert (caught.value.step, str(caught.value)) == (of_a_run.value.step, str(of_a_run.value))


def test_a_session_that_does_not_start_shows_what_its_interpreter_said() -> None:
    with Jail("untrusted", without=["selectors"]) as jail, pytest.raises(SessionError, match="No module named 'selectors'"):
        jail.session()


def test_a_launcher_that_dies_under_a_session_is_the_cause_of_its_error(session: Session) -> None:
    timer = threading.Timer(0.3 * PATIENCE, os.kill, (session._process.launcher.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(SessionError, match="the launcher ended") as caught:
        session.run("import time; time.sleep(30)", wall_time=30.0)
    timer.join()
    assert isinstance(caught.value.__cause__, LauncherDied) and session.result is None
    with pytest.raises(SessionError, match="the launcher ended"):
        session.run("1")


CALLS: dict[str, Callable[[Session], object]] = {
    "get": lambda session: session.get("x"),
    "put": lambda session: session.put("x", bytes(8 << 20)),
    "checkpoint": lambda session: session.checkpoint(),
    "restore": lambda session: session.restore(),
    "run": lambda session: session.run("#" * (8 << 20)),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_keeper_that_a_cell_has_stopped_holds_its_caller_up_for_a_bounded_time(
    call: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = "time.sleep(.2); os.kill(os.getppid(), 19)"
    session.run(f"import os, threading, time\ndef later():\n {stop}\n while True: os.write(1, b'x')")
    session.run("threading.Thread(target=later).start()").check()
    time.sleep(0.5 * PATIENCE)
    monkeypatch.setattr("nsjail_py.session.PATIENCE", 0.5)
    monkeypatch.setattr("nsjail_py.session.PACE", 8 << 20)
    begin = time.monotonic()
    with pytest.raises(SessionError, match="did not answer in time"):
        CALLS[call](session)
    assert time.monotonic() - begin < 5 * PATIENCE
    assert session.result is not None and session.result.verdict is Verdict.killed


def test_the_lifetime_of_a_session_ends_it() -> None:
    with Jail("untrusted") as jail, jail.session(lifetime=1.5) as session:
        with pytest.raises(SessionError, match="wall_time"):
            session.run("import time; time.sleep(30)", wall_time=30.0)
        assert session.result is not None and session.result.verdict is Verdict.wall_time


def test_sessions_of_any_lifetime_are_forked_from_one_warm_interpreter() -> None:
    with Jail("untrusted", preload=["json"], stock=0) as jail:
        templates = set()
        for number in range(4):
            with jail.session(lifetime=60.0 + number) as session:
                session.run("1").check()
                templates.add(session._process.template)
        assert len(templates) == 1 and None not in templates
        with jail.session(lifetime=0.5) as session, pytest.raises(SessionError, match="wall_time"):
            session.run("import time; time.sleep(30)", wall_time=30.0)
        assert session.result is not None and session.result.evidence["limit"] == 0.5
        with jail.session() as session:
            session.run("import time; time.sleep(.6)").check()


def test_sessions_do_not_meet(jail: Jail) -> None:
    with jail.session() as one, jail.session() as two:
        one.run("x = 1; open('mine', 'w').write('1')")
        assert two.run("x").error and two.run("open('mine')").error
        assert one.run("import os; os.getpid() > 1 and 'jail'").value == "'jail'"


@pytest.mark.parametrize("preload", [None, ["json"]], ids=["cold", "warm"])
def test_a_session_starts_where_only_the_needed_part_of_the_standard_library_is_there(preload: list[str] | None) -> None:
    with Jail("untrusted", imports=["json"], preload=preload) as jail, jail.session() as session:
        assert session.run("import json; json.dumps(1)").check().value == "'1'"
        assert session.run("import sqlite3").error[0] == "ModuleNotFoundError"  # type: ignore[index]


def test_a_policy_that_leaves_out_what_a_session_imports_is_told_so() -> None:
    with Jail("untrusted", without=["signal", "socket", "sqlite3"]) as jail, pytest.raises(PolicyError, match=r"imports signal, socket$"):
        jail.session()
    with Jail("untrusted", without=["sqlite3"]) as jail, jail.session() as session:
        assert session.run("import sqlite3").error[0] == "ModuleNotFoundError"  # type: ignore[index]


def test_threads_take_turns(session: Session) -> None:
    session.run("total = 0").check()
    threads = [threading.Thread(target=session.run, args=("total += 1",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.run("total").value == "20"


def test_a_session_can_be_closed_while_a_cell_runs_in_another_thread(session: Session) -> None:
    timer = threading.Timer(0.3 * PATIENCE, session.close)
    timer.start()
    with pytest.raises(SessionError, match="killed by the caller"):
        session.run("import time; time.sleep(5)")
    timer.join()
    with pytest.raises(SessionError, match="killed by the caller"):
        session.run("1")


def test_a_policy_that_has_no_room_for_another_process_says_so() -> None:
    with Jail("untrusted", processes=2) as jail, jail.session() as session:
        session.run("x = 1").check()
        with pytest.raises(SessionError, match=r"limits\.processes = 2"):
            session.checkpoint()
        assert session.run("x").value == "1"
    assert nsjail_py.run(["/bin/true"]).ok


def test_a_checkpoint_keeps_one_process_however_often_it_is_gone_back_to() -> None:
    with Jail("untrusted", processes=12) as jail, jail.session() as session:  # the keeper, the active one, and ten
        for number in range(10):
            session.run(f"x = {number}").check()
            session.checkpoint()
            for _ in range(3):
                session.restore()
        with pytest.raises(SessionError, match="each checkpoint keeps one"):
            session.checkpoint()
        session.restore(4)
        assert session.run("x").value == "4"


STOPS_THE_KEEPER = """
import os, signal, socket, sys, threading, time
keeper, control = os.getppid(), None
for n in os.listdir("/proc/self/fd"):
    try:
        if os.readlink("/proc/self/fd/" + n).startswith("socket:"): control = int(n)
    except OSError: pass
def stop():
    while True:
        call = open("/proc/%d/syscall" % keeper).read().split()
        if call[0] in ("44", "46") and control is not None: break  # sendto and sendmsg: it passes the answer on
    os.kill(keeper, signal.SIGSTOP)
threading.Thread(target=stop, daemon=True).start()
answer = b'{"value": "x", "number": 1}'
control = socket.socket(fileno=os.dup(control))
control.sendall(len(answer).to_bytes(8, "little") + (60 << 20).to_bytes(8, "little") + answer)
for _ in range(60): control.sendall(bytes(1 << 20))
time.sleep(60)
"""


def test_a_cell_that_stops_the_keeper_in_the_middle_of_its_answer_gains_no_time_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsjail_py.session.PACE", 60 << 20)
    with Jail("untrusted").session() as session:
        began = time.monotonic()
        with pytest.raises(SessionError):
            session.run(STOPS_THE_KEEPER, wall_time=2.0 * PATIENCE)
        assert time.monotonic() - began < (2 * PATIENCE + 1 + 1) + 5 * PATIENCE
