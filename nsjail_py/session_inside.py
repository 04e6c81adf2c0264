"""What a session runs, inside: a keeper, which runs none of the user's code, and below it the processes that hold his state.

One of these is active and runs the cells. A checkpoint is one that has forked and waits: to go back is to end the active one, and to let
the waiting one fork again. fork(2)

Its text is the script, so it imports nothing of ours. What it says is checked outside (session.py): the user's code can say it too.
"""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from errno import EFBIG, EINVAL
from typing import Any, NoReturn

CALLER = 3
COUNT = 8
"""Bytes of each of the two lengths before a message: of its head, which is JSON, and of its bytes."""
ONLY_AST = 0x400
MOST_TEXT, MOST_FIGURES = 1 << 20, 128 << 20
PART = 1 << 20
CELLS_OWN = {"value", "error", "wall", "cpu", "figures"}
"""What is a cell's to say. The rest of an answer is the keeper's."""
NEAREST, LONG = 0.002, 3600.0
"""Seconds between two looks at the clocks, at least and at most."""
PATIENCE = 0.2
"""Seconds for what is about to end by itself."""


# ---- messages


def send(to: socket.socket, head: dict[str, Any], data: bytes = b"", *, descriptor: int | None = None) -> None:
    text = json.dumps(head).encode()
    lengths = len(text).to_bytes(COUNT, "little") + len(data).to_bytes(COUNT, "little")
    if descriptor is None:
        to.sendall(lengths + text)
    else:
        socket.send_fds(to, [lengths + text], [descriptor])
    if data:
        to.sendall(data)


def receive(source: socket.socket) -> tuple[dict[str, Any], bytes, int | None]:
    """A message and its descriptor. Raises EOFError at the end."""
    head, size, descriptor = receive_head(source)
    return head, _exactly(source, size), descriptor


def receive_head(source: socket.socket) -> tuple[dict[str, Any], int, int | None]:
    """A message's head, the number of bytes that follow, and its descriptor. Raises EOFError at the end."""
    lengths, descriptors, _, _ = socket.recv_fds(source, 2 * COUNT, 1)
    lengths += _exactly(source, 2 * COUNT - len(lengths)) if lengths else b""
    if not lengths:
        raise EOFError
    head = json.loads(_exactly(source, int.from_bytes(lengths[:COUNT], "little")))
    return head, int.from_bytes(lengths[COUNT:], "little"), descriptors[0] if descriptors else None


def receive_parts(source: socket.socket, size: int) -> Iterator[bytes]:
    """So many bytes, without room for all of them."""
    for begin in range(0, size, PART):
        yield _exactly(source, min(PART, size - begin))


def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = source.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)


# ---- the processes that hold the state


def too_late(*_: object) -> None:
    """SIGINT, where no cell runs."""


class Worker:
    """Runs the cells; or, where its state is kept, forks, and waits for those that it has forked."""

    def __init__(self, control: socket.socket) -> None:
        self.control, self.pid = control, os.getpid()
        self.on_interrupt: Any = signal.default_int_handler  # or what a cell has put in its place
        self.mask: set[int] | None = None
        """Of a kept state: which signals were blocked when it was not kept yet."""
        self.main = sys.modules["__main__"] = type(sys)("__main__")
        signal.signal(signal.SIGINT, too_late)
        os.register_at_fork(after_in_child=self._let_go)

    def _let_go(self) -> None:
        """In a child, be it a cell's: it answers nothing on our socket, and the end of our process is the end of that."""
        self.control.close()

    def serve(self) -> NoReturn:
        """Until it is killed; also where a cell has closed the socket, which the keeper hears."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.obey(*receive(self.control))
        while True:
            time.sleep(LONG)

    def obey(self, head: dict[str, Any], data: bytes, descriptor: int | None) -> None:
        if head["do"] == "run":
            self.answer(head, *self.run(data.decode(), head["name"]))
        elif head["do"] == "end":
            self.answer(head, ended(head["pid"], head["patience"]))
        elif head["do"] == "bury":
            for pid in head["pids"]:
                ended(pid, 0.0)
        elif head["do"] == "settle":
            self.answer(head, {})
        elif descriptor is not None:
            self.fork(head, socket.socket(fileno=descriptor))

    def answer(self, head: dict[str, Any], answer: dict[str, Any], data: bytes = b"") -> None:
        send(self.control, answer | {"number": head["number"]}, data)

    def fork(self, head: dict[str, Any], fresh: socket.socket) -> None:
        """Goes on twice: in the process that waits from now on, where no signal wakes the cells' code any more, and in its copy, which
        hears the fresh socket. Threads are counted behind the fork, since OpenBLAS ends its own before one."""
        try:
            with warnings.catch_warnings(), numbers_kept():
                warnings.simplefilter("ignore")  # that there are threads, since Python 3.12
                pid = os.fork()
        except OSError as error:
            fresh.close()
            return self.answer(head, {"errno": error.errno})
        if pid == 0:
            if self.mask is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
            self.control, self.pid, self.mask = fresh, os.getpid(), None
            return None
        fresh.close()
        if threads := other_threads():
            ended(pid, 0.0)
            return self.answer(head, {"threads": threads})
        if self.mask is None:
            self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return self.answer(head, {"pid": pid})

    def run(self, source: str, name: str) -> tuple[dict[str, Any], bytes]:
        begin, used = time.perf_counter(), time.process_time()
        text: str | None = None
        error: BaseException | None = None
        pictures: list[bytes] = []
        try:
            signal.signal(signal.SIGINT, self.on_interrupt)
            value = evaluate(self.main, source, name)
            text = None if value is None else clean(repr(value))
        except BaseException as raised:
            error = raised
        try:
            if os.getpid() == self.pid:
                pictures.extend(figures())
            flush()
        except BaseException as raised:
            error = raised if error is None else error
        while True:
            try:
                self.on_interrupt = signal.signal(signal.SIGINT, too_late)
                break
            except KeyboardInterrupt as raised:  # just before
                error = raised if error is None else error
        if os.getpid() != self.pid:
            leave(error)
        answer = {
            "value": text if error is None else None,
            "error": None if error is None else told(error),
            "wall": time.perf_counter() - begin,
            "cpu": time.process_time() - used,
            "figures": [len(picture) for picture in pictures],
        }
        return answer, b"".join(pictures)


@contextlib.contextmanager
def numbers_kept() -> Iterator[None]:
    """`random` seeds itself anew in every fork, and a checkpoint is to be what it was."""
    loaded: Any = sys.modules.get("random")
    state = loaded.getstate() if hasattr(loaded, "getstate") else None
    yield
    if state is not None:
        loaded.setstate(state)


def other_threads() -> int:
    """Of this process. One that has just been waited for is still seen for a moment."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            count = len(os.listdir("/proc/self/task")) - 1
        except OSError:  # a policy may have no /proc
            count = len(sys._current_frames()) - 1
        if not count or time.monotonic() > deadline:
            return count
        time.sleep(NEAREST)


def ended(pid: int, patience: float) -> dict[str, Any]:
    """How a child of ours has ended. It is killed where it has not within so many seconds."""
    deadline, killed = time.monotonic() + patience, False
    with contextlib.suppress(ChildProcessError):  # none of ours; or a cell has seen to it that nobody hears of its children
        while True:
            waited, status = os.waitpid(pid, 0 if killed else os.WNOHANG)
            if waited:
                return {"status": status, "killed": killed}
            if time.monotonic() < deadline:
                time.sleep(NEAREST)
            else:
                os.kill(pid, signal.SIGKILL)
                killed = True
    return {"status": 0, "killed": killed}


def leave(error: BaseException | None) -> NoReturn:
    """The end of a process that a cell has forked, which is no part of the session: as that of any interpreter."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        raise error
    if error is None:
        raise SystemExit
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(told(error)[2])
    raise SystemExit(1)


def evaluate(main: Any, source: str, name: str) -> object:
    """Runs a cell; the value of its last statement, if that is an expression."""
    import linecache

    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    tree: Any = compile(source, name, "exec", ONLY_AST, dont_inherit=True)
    last = None
    if tree.body and type(tree.body[-1]).__name__ == "Expr":
        last = type(compile("0", name, "eval", ONLY_AST))(tree.body.pop().value)
    exec(compile(tree, name, "exec", dont_inherit=True), main.__dict__)
    return None if last is None else eval(compile(last, name, "eval", dont_inherit=True), main.__dict__)


def told(error: BaseException) -> list[str]:
    """Its type, what it says, and the traceback from the cell's own frames on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(error.with_traceback(trace)))
        return [clean(type(error).__qualname__), clean(str(error)), clean(text)]
    except BaseException:  # an exception whose own methods raise
        return [clean(type(error).__qualname__), "", clean(f"{type(error).__qualname__}\n")]


def clean(text: str) -> str:
    """Text of bounded size that UTF-8 can say: half a surrogate becomes an escape."""
    return text[:MOST_TEXT].encode(errors="backslashreplace")[:MOST_TEXT].decode(errors="ignore")


def figures() -> Iterator[bytes]:
    """matplotlib's open figures as PNG; they are closed then, also where one cannot be drawn."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    import io

    size = 0
    try:
        for number in pyplot.get_fignums():
            file = io.BytesIO()
            pyplot.figure(number).savefig(file, format="png")
            size += file.tell()
            if size > MOST_FIGURES:
                raise ValueError(f"the figures of a cell are at most {MOST_FIGURES >> 20} MiB")
            yield file.getvalue()
    finally:
        pyplot.close("all")


def flush() -> None:
    """What the cell has put in the place of its outputs, or closed, is its own affair."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


# ---- the keeper


class Threads(Exception):
    """So many that no fork carries over."""


class State:
    """A process that holds a state of the session, as the keeper knows it."""

    def __init__(self, pid: int, control: socket.socket, parent: "State | None") -> None:
        self.pid, self.control, self.parent = pid, control, parent
        self.number, self.lost = 0, False

    def tell(self, head: dict[str, Any], data: bytes = b"", descriptor: int | None = None) -> None:
        self.number += 1
        send(self.control, head | {"number": self.number}, data, descriptor=descriptor)

    def hear(self) -> tuple[dict[str, Any], bytes]:
        """The answer to what it was told last. Raises EOFError where it has ended."""
        try:
            answer, data, _ = receive(self.control)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or answer.pop("number", None) != self.number:
            raise SystemExit("a cell's own code has answered in the session's place")
        return answer, data

    def ask(self, head: dict[str, Any], descriptor: int | None = None) -> dict[str, Any]:
        """Raises EOFError where it has ended."""
        try:
            self.tell(head, descriptor=descriptor)
            return self.hear()[0]
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None

    def fork(self) -> "State":
        """Raises OSError where there may be no more processes, Threads where one would be left behind, and EOFError where it has ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            answer = self.ask({"do": "fork"}, theirs.fileno())
        if "pid" not in answer:
            ours.close()
            raise OSError(answer["errno"], os.strerror(answer["errno"])) if "errno" in answer else Threads(answer["threads"])
        return State(answer["pid"], ours, self)

    def drop(self) -> None:
        """Kills it, and does not wait: to clear away what it had takes longer than to go on without it. Its parent waits meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.control.close()
        if self.parent is not None:
            self.parent.bury([self.pid])

    def bury(self, pids: list[int]) -> None:
        """Waits for those of them that are children of its own: they have been killed."""
        with contextlib.suppress(OSError):
            self.tell({"do": "bury", "pids": pids})

    def end(self, patience: float) -> dict[str, Any]:
        """How it has ended, which only its parent learns. It is killed where it has not within so many seconds."""
        try:
            return self.parent.ask({"do": "end", "pid": self.pid, "patience": patience}) if self.parent else ended(self.pid, patience)
        except EOFError:  # nobody does
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            return {"status": 0, "killed": False}
        finally:
            self.control.close()


class Clocks:
    """What a process has used since they were started, in seconds, by the names of the limits. clock_getcpuclockid(3)"""

    def __init__(self, pid: int) -> None:
        self.clock, self.begin, self.base, self.cpu = ~pid << 3 | 2, time.monotonic(), 0.0, 0.0
        self.base = self.read()["cpu_time"]

    def read(self) -> dict[str, float]:
        with contextlib.suppress(OSError):  # the process is gone
            self.cpu = time.clock_gettime(self.clock)
        return {"wall_time": time.monotonic() - self.begin, "cpu_time": self.cpu - self.base}


def processes() -> list[int]:
    """All that can be seen, but for process 1 and our own."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) not in (1, os.getpid())]
    except OSError:  # a policy may have no /proc
        return []


class Keeper:
    """Answers each command of the caller, a file in several messages."""

    def __init__(self, caller: socket.socket) -> None:
        self.caller = caller
        self.kept: list[State] = []
        self.active: State | None = self._first()
        self.running = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _first(self) -> State:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self.caller.close()
            Worker(theirs).serve()
        theirs.close()
        return State(pid, ours, None)

    def _interrupt(self, *_: object) -> None:
        if self.running and self.active is not None:
            os.kill(self.active.pid, signal.SIGINT)

    def serve(self) -> None:
        commands = {name: getattr(self, name) for name in ("run", "checkpoint", "restore", "lost", "put", "get")}
        send(self.caller, {})
        while True:
            try:
                head, size, _ = receive_head(self.caller)
            except EOFError:
                return
            if head["do"] not in commands:
                continue  # it came too late for the cell that it was about
            data = receive_parts(self.caller, size)
            try:
                answer, result = commands[head["do"]](head, data)
            except OSError as error:
                answer, result = {"errno": error.errno}, b""
            except Threads as error:
                answer, result = {"threads": error.args[0]}, b""
            except ValueError:
                answer, result = {"errno": EINVAL}, b""
            for _ in data:
                pass  # a file for which there was no room
            self._say(head, answer, result)

    def _say(self, head: dict[str, Any], answer: dict[str, Any], data: bytes = b"") -> None:
        send(self.caller, answer | {"gone": self.active is None, "number": head["number"]}, data)

    def run(self, head: dict[str, Any], data: Iterator[bytes]) -> tuple[dict[str, Any], bytes]:
        if self.active is None:
            return {}, b""
        self.running = True
        try:
            return self._run(self.active, head, b"".join(data))
        finally:
            self.running = False

    def _run(self, active: State, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        clocks = Clocks(active.pid)
        try:
            active.tell({"do": "run", "name": head["name"]}, data)
        except OSError:  # since the last cell
            return self._died("ended", clocks)
        while True:
            used = clocks.read()
            for name in used:
                if head[name] is not None and used[name] >= head[name]:
                    return self._died(name, clocks)
            rests = [LONG]
            if head["wall_time"] is not None:
                rests.append(head["wall_time"] - used["wall_time"])
            if head["cpu_time"] is not None:  # all processors together could use it up by then
                rests.append((head["cpu_time"] - used["cpu_time"]) / (os.cpu_count() or 1))
            ready, _, _ = select.select([active.control, self.caller], [], [], max(NEAREST, min(rests)))
            if active.control in ready:
                try:
                    answer, result = active.hear()
                    return {name: answer[name] for name in answer.keys() & CELLS_OWN}, result
                except (EOFError, OSError):
                    return self._died("ended", clocks)
            if self.caller in ready:
                stop = receive(self.caller)[0]
                return self._died(stop["why"], clocks)

    def _died(self, why: str, clocks: Clocks) -> tuple[dict[str, Any], bytes]:
        """What has ended, or is to, and with it all that holds no other state."""
        assert self.active is not None
        active, self.active = self.active, None
        used = clocks.read()
        how = active.end(PATIENCE if why == "ended" else 0.0)
        if why == "ended" and how["killed"]:
            why = "closed"
        self._clear()
        return {"died": why, "status": how["status"], "wall": used["wall_time"], "cpu": used["cpu_time"]}, b""

    def _clear(self) -> None:
        """Ends what holds no state. All are stopped first, at one time, so that none forks another while it is looked for; whoever hides
        from /proc, or where there is none, stays stopped. kill(2)"""
        ours = {state.pid for state in (*self.kept, self.active) if state is not None}
        with contextlib.suppress(ProcessLookupError):  # there is nobody
            os.kill(-1, signal.SIGSTOP)
        others = [pid for pid in processes() if pid not in ours]
        for number, pids in ((signal.SIGKILL, others), (signal.SIGCONT, ours)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        for state in self.kept:
            state.bury(others)

    def checkpoint(self, head: dict[str, Any], data: Iterator[bytes]) -> tuple[dict[str, Any], bytes]:
        if self.active is None:
            return {}, b""
        try:
            fresh = self._forked(self.active)
        except EOFError:
            return self._died("ended", Clocks(self.active.pid))
        self.kept.append(self.active)
        self.active = fresh
        return {"id": len(self.kept) - 1}, b""

    def _forked(self, state: State) -> State:
        """Where there is no room, it is waited for those that are dead already to be buried."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return state.fork()
            except OSError:
                if time.monotonic() > deadline:
                    raise
            for one in self.kept:
                with contextlib.suppress(EOFError):
                    one.ask({"do": "settle"})
            time.sleep(NEAREST)

    def restore(self, head: dict[str, Any], data: Iterator[bytes]) -> tuple[dict[str, Any], bytes]:
        number = head["id"]
        if not -len(self.kept) <= number < len(self.kept):
            return {"unknown": True}, b""
        kept, before = self.kept[number], self.active
        try:
            try:
                self.active = kept.fork()
            except OSError:  # there may be room without what is to go
                self.active = None
            if before is not None:
                before.drop()
            self._clear()
            if self.active is None:
                self.active = self._forked(kept)
        except EOFError:
            return {"died": "ended"}, b""
        return {}, b""

    def lost(self, head: dict[str, Any], data: Iterator[bytes]) -> tuple[dict[str, Any], bytes]:
        """The checkpoints that have ended since this was asked last. What has just been killed takes a moment to be gone."""
        time.sleep(PATIENCE)
        poll = select.poll()
        for state in self.kept:
            poll.register(state.control, 0)
        gone = {descriptor for descriptor, _ in poll.poll(0)}
        lost = [number for number, state in enumerate(self.kept) if state.control.fileno() in gone and not state.lost]
        for number in lost:
            self.kept[number].lost = True
        return {"lost": lost}, b""

    def put(self, head: dict[str, Any], data: Iterator[bytes]) -> tuple[dict[str, Any], bytes]:
        with open(head["path"], "wb", opener=_opener) as file:
            for part in data:
                file.write(part)
        return {}, b""

    def get(self, head: dict[str, Any], data: Iterator[bytes]) -> tuple[dict[str, Any], bytes]:
        with open(head["path"], "rb", opener=_opener) as file:
            size = os.fstat(file.fileno()).st_size
            while size <= head["most"] and (part := file.read(PART)):
                self._say(head, {"more": True}, part)
                size = max(size, file.tell())
        return {"errno": EFBIG} if size > head["most"] else {}, b""


def _opener(path: str, flags: int) -> int:
    """A pipe that the user's code has made would hold the keeper for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(EINVAL, "not a file")
    return descriptor


if __name__ == "__main__":
    Keeper(socket.socket(fileno=CALLER)).serve()
