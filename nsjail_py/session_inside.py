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
from collections.abc import Iterator
from errno import EFBIG, EINVAL
from typing import Any, NoReturn

CALLER = 3
COUNT = 8
"""Bytes of each of the two lengths before a message: of its head, which is JSON, and of its bytes."""
ONLY_AST = 0x400
MOST_TEXT, MOST_FIGURES = 1 << 20, 128 << 20
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
    lengths, descriptors, _, _ = socket.recv_fds(source, 2 * COUNT, 1)
    lengths += _exactly(source, 2 * COUNT - len(lengths)) if lengths else b""
    if not lengths:
        raise EOFError
    head = json.loads(_exactly(source, int.from_bytes(lengths[:COUNT], "little")))
    data = _exactly(source, int.from_bytes(lengths[COUNT:], "little"))
    return head, data, descriptors[0] if descriptors else None


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
        while True:
            try:
                head, data, descriptor = receive(self.control)
            except (EOFError, OSError):
                os._exit(0)
            if head["do"] == "run":
                self.answer(head, *self.run(data.decode(), head["name"]))
            elif head["do"] == "reap":
                ended = buried(head["pid"])
                if head["tell"]:
                    self.answer(head, ended)
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
            with numbers_kept():
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
            buried(pid)
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
        if os.getpid() != self.pid:
            leave(error)
        try:
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
    loaded = sys.modules.get("random")
    state = loaded and loaded.getstate()
    yield
    if loaded:
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


def buried(pid: int) -> dict[str, Any]:
    """How a child of ours has ended, which is killed where it has not."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # a cell may have seen to it that nobody hears of that
        return {"status": os.waitpid(pid, 0)[1]}
    return {"status": 0}


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
    """A process that holds a state of the session."""

    def __init__(self, pid: int, control: socket.socket, parent: "State | None") -> None:
        self.pid, self.control, self.parent = pid, control, parent
        self.number = 0

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
        if self.parent is None:
            return
        with contextlib.suppress(OSError):
            self.parent.tell({"do": "reap", "pid": self.pid, "tell": False})

    def end(self) -> int:
        """Kills it and gives its wait status, which only its parent learns."""
        self.control.close()
        if self.parent is None:
            return int(buried(self.pid)["status"])
        return int(self.parent.ask({"do": "reap", "pid": self.pid, "tell": True})["status"])


class Keeper:
    """Answers each command of the caller with one message."""

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
        commands = {"run": self.run, "checkpoint": self.checkpoint, "restore": self.restore, "put": self.put, "get": self.get}
        send(self.caller, {})
        while True:
            try:
                head, data, _ = receive(self.caller)
            except EOFError:
                return
            if head["do"] not in commands:
                continue  # it came too late for the cell that it was about
            try:
                answer, result = commands[head["do"]](head, data)
            except OSError as error:
                answer, result = {"errno": error.errno}, b""
            except Threads as error:
                answer, result = {"threads": error.args[0]}, b""
            except ValueError:
                answer, result = {"errno": EINVAL}, b""
            send(self.caller, answer | {"gone": self.active is None, "number": head["number"]}, result)

    def run(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        if self.active is None:
            return {}, b""
        self.running = True
        try:
            return self._run(self.active, head, data)
        finally:
            self.running = False

    def _run(self, active: State, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        clock = ~active.pid << 3 | 2
        try:
            begin, base = time.monotonic(), time.clock_gettime(clock)
            active.tell({"do": "run", "name": head["name"]}, data)
        except OSError:  # since the last cell
            return self._died("ended", 0.0)
        while True:
            try:
                wall, cpu = time.monotonic() - begin, time.clock_gettime(clock) - base
            except OSError:
                return self._died("ended", 0.0)
            for name, used in (("wall_time", wall), ("cpu_time", cpu)):
                if head[name] is not None and used >= head[name]:
                    return self._died(name, used)
            rests = [LONG]
            if head["wall_time"] is not None:
                rests.append(head["wall_time"] - wall)
            if head["cpu_time"] is not None:  # all processors together could use it up by then
                rests.append((head["cpu_time"] - cpu) / (os.cpu_count() or 1))
            ready, _, _ = select.select([active.control, self.caller], [], [], max(NEAREST, min(rests)))
            if active.control in ready:
                try:
                    return active.hear()
                except (EOFError, OSError):
                    return self._died("ended", 0.0)
            if self.caller in ready:
                stop = receive(self.caller)[0]
                return self._died(stop["why"], 0.0)

    def _died(self, why: str, observed: float) -> tuple[dict[str, Any], bytes]:
        assert self.active is not None
        active, self.active = self.active, None
        try:
            status = active.end()
        except (EOFError, ChildProcessError):
            status = 0
        return {"died": why, "observed": observed, "status": status}, b""

    def checkpoint(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        if self.active is None:
            return {}, b""
        try:
            fresh = self._forked(self.active)
        except EOFError:
            return self._died("ended", 0.0)
        self.kept.append(self.active)
        self.active = fresh
        return {"id": len(self.kept) - 1}, b""

    def _forked(self, state: State) -> State:
        """Where there is no room, once more when those are buried that are dead already."""
        try:
            return state.fork()
        except OSError:
            for one in self.kept:
                with contextlib.suppress(EOFError):
                    one.ask({"do": "settle"})
            return state.fork()

    def restore(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        number = head["id"]
        if not -len(self.kept) <= number < len(self.kept):
            return {"unknown": True}, b""
        before = self.active
        try:
            try:
                self.active = self._forked(self.kept[number])
            except OSError:  # with one process less there may be room
                if before is None:
                    raise
                before.drop()
                self.active = before = None
                self.active = self._forked(self.kept[number])
        except EOFError:
            return {"died": "ended"}, b""
        if before is not None:
            before.drop()
        return {}, b""

    def put(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        with open(head["path"], "wb", opener=_opener) as file:
            file.write(data)
        return {}, b""

    def get(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        with open(head["path"], "rb", opener=_opener) as file:
            size = os.fstat(file.fileno()).st_size
            return ({"errno": EFBIG}, b"") if size > head["most"] else ({}, file.read(head["most"]))


def _opener(path: str, flags: int) -> int:
    """A pipe that the user's code has made would hold the keeper for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(EINVAL, "not a file")
    return descriptor


if __name__ == "__main__":
    Keeper(socket.socket(fileno=CALLER)).serve()
