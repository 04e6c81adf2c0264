"""`JailExecutor`: concurrent.futures, with each call in a jail of its own, forked from a warm interpreter.

Functions and arguments go in pickled (cloudpickle). Results come back as data that is safe to read from anybody: numbers, text, bytes,
lists, dictionaries, dates, None, and numpy arrays (unpack.py). Nothing that a job wrote is ever unpickled here.
"""

from __future__ import annotations

import fcntl
import functools
import io
import itertools
import logging
import os
import site
import sys
import sysconfig
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from . import launcher
from .errors import JailError, PolicyError, RunFailed, during
from .executor_inside import CALL_FD, LENGTH, RESULT_FD
from .jail import DEVNULL, PIPE, Jail, modules
from .plan import memory_file, sealed
from .policy import Policy
from .retry import to_end
from .streams import deadline_of, left
from .unpack import decode

LOGGER = logging.getLogger("concurrent.futures")
RESULT_SIZE = 64 << 20
"""Bytes of one result."""
PENDING = 1000
"""Calls that may wait; a further `submit` waits for room."""


class Call(NamedTuple):
    """A call that waits for its turn."""

    future: Future[Any]
    pickled: bytes


class Queue:
    """Calls by the thread that brought them; each thread has its turn. Bounded: `put` waits for room, where it may, until the deadline."""

    def __init__(self, most: int) -> None:
        self.most, self.size, self.workers, self.closed, self.process = most, 0, 0, False, os.getpid()
        self.turns: OrderedDict[threading.Thread, deque[Call]] = OrderedDict()
        self.changed = threading.Condition()

    def put(self, call: Call, *, waits: bool, deadline: float | None) -> None:
        with self.changed:
            while waits and self.size >= self.most and not self.closed:
                if not self.changed.wait(left(deadline)):
                    raise TimeoutError
            if self.closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self.turns.setdefault(threading.current_thread(), deque()).append(call)
            self.size += 1
            self.changed.notify_all()

    def work(self, answer: Callable[[Call], None]) -> bool:
        """Takes calls until there will be none. Whether nobody else does so any more."""
        with self.changed:
            self.workers += 1
        while (call := self._get()) is not None:
            try:
                answer(call)
            except BaseException:  # a callback's, which Future itself tells of where it is an Exception
                LOGGER.critical("a callback of a JailExecutor's future", exc_info=True)
            del call
        with self.changed:
            self.workers -= 1
            return not self.workers

    def _get(self) -> Call | None:
        """The next call, or None when there will be none."""
        with self.changed:
            while not self.size and not self.closed:
                self.changed.wait()
            if not self.size:
                return None
            owner, calls = self.turns.popitem(last=False)
            call = calls.popleft()
            if calls:
                self.turns[owner] = calls  # behind all others
            self.size -= 1
            self.changed.notify_all()
            return call

    def close(self, drop: bool) -> list[Call]:
        """No more calls; those that wait are given back if they are to be dropped."""
        with self.changed:
            self.closed = True
            dropped = [call for calls in self.turns.values() for call in calls] if drop else []
            if drop:
                self.turns.clear()
                self.size = 0
            self.changed.notify_all()
            return dropped


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()
"""Threads that wait for calls would hold the end of their process up."""


def _at_exit() -> None:
    """As concurrent.futures does: what has been submitted is still done. The interpreter waits for the threads."""
    for queue in list(_queues):
        if queue.process == os.getpid():  # nobody here gives back what a thread of the parent's held at the fork
            queue.close(drop=False)


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]  # atexit itself comes after that wait


class JailExecutor(Executor):
    """Runs functions in jails, `max_workers` at a time.

    policy, changes: as for Jail. preload: modules that the functions use; they and the distributions that they come from are there without
    an import. pending: how many calls may wait; a `submit` beyond waits for room, but not in a done-callback, for which room would be
    made by the thread that runs it. Threads that submit at one time take turns.
    Raises PolicyError as Jail does, and ImportError without cloudpickle (the extra `warm`).

    An executor that is dropped, and the end of the interpreter, let the calls be done that have been submitted. In a forked child it begins
    anew, with workers of its own; the futures of the parent's calls are done in the parent only.

    A future's exception is JobError for what the function raised (with its traceback as text), RunFailed for a run that met a limit or a
    signal, SetupError when there was no jail for it, JailError for a result that cannot be read: it has at most 64 MiB, four million
    values (an array counts as a hundred), and 200 levels.
    """

    def __init__(
        self,
        policy: Policy | str | os.PathLike[str] = "untrusted",
        max_workers: int | None = None,
        *,
        preload: Sequence[str] = (),
        pending: int = PENDING,
        **changes: Any,
    ) -> None:
        self._pickle = pickler()
        workers = max_workers if max_workers is not None else os.cpu_count() or 1
        if workers < 1 or pending < 1:
            raise ValueError("max_workers and pending must be 1 or more")
        self._jail = Jail(
            policy, preload=tuple(dict.fromkeys((*modules(preload), "cloudpickle", "msgspec"))), stock=min(workers, 64), **changes
        )
        if self._jail.policy.python.scan != "off":
            raise PolicyError('$.python.scan: a function has no text to look at: scan = "off", or single runs')
        self._workers, self._pending = workers, pending
        self._begin()
        launcher.inheritable.add(self)

    def _begin(self) -> None:
        self._queue, self._lock = Queue(self._pending), threading.Lock()
        self._threads: list[threading.Thread] = []
        _queues.add(self._queue)
        self._finalizer = weakref.finalize(self, self._queue.close, drop=False)
        self._finalizer.atexit = False

    def inherited(self) -> None:
        """In a forked child: the threads, and the calls that wait for them, are the parent's."""
        closed = self._queue.closed
        self._finalizer.detach()
        self._begin()
        self._queue.closed = closed

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As concurrent.futures says. What cannot be pickled is an error here, not in the future; so is a thread that cannot be started
        (RuntimeError). The call is not made then."""
        return self._submit(fn, args, kwargs, None)

    def _submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Future[Any]:
        call = Call(Future(), self._pickle((fn, args, kwargs)))
        with self._lock:
            waits = threading.current_thread() not in self._threads
            if len(self._threads) < self._workers and not self._queue.closed:
                thread = threading.Thread(target=_work, args=(self._queue, self._jail), name=f"jail-{len(self._threads)}", daemon=False)
                thread.start()
                self._threads.append(thread)
        self._queue.put(call, waits=waits, deadline=deadline)
        return call.future

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1) -> Iterator[Any]:
        """As concurrent.futures says, but at most `pending` calls ahead of what is taken (or `max_workers`, if that is more), so an
        iterable may have no end; what is left of it is submitted by whoever takes results. timeout: seconds from this call on.
        chunksize: each call has a jail of its own, whatever it says."""
        if chunksize < 1:
            raise ValueError("chunksize must be 1 or more")
        deadline = deadline_of(timeout)
        calls = (self._submit(fn, arguments, {}, deadline) for arguments in zip(*iterables, strict=False))
        most = max(self._pending, self._workers)
        return _results(calls, deque(itertools.islice(calls, most)), deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As concurrent.futures says; the warm interpreter ends when the last call has."""
        for call in self._queue.close(cancel_futures):
            call.future.cancel()
            call.future.set_running_or_notify_cancel()
        if wait:
            for thread in self._threads:
                thread.join()


def _results(calls: Iterator[Future[Any]], ahead: deque[Future[Any]], deadline: float | None) -> Iterator[Any]:
    """In order; for each that is taken another is submitted. Whoever takes no more cancels those that are ahead."""
    try:
        while ahead:
            ahead[0].exception(left(deadline))
            yield ahead.popleft().result()
            ahead.extend(itertools.islice(calls, 1))
    finally:
        for future in ahead:
            future.cancel()


def _work(queue: Queue, jail: Jail) -> None:
    if queue.work(functools.partial(_answer, jail)):
        jail.close()


def _answer(jail: Jail, call: Call) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        value = _call(jail, call.pickled)
    except BaseException as error:
        call.future.set_exception(error)
    else:
        call.future.set_result(value)


def _call(jail: Jail, pickled: bytes) -> Any:
    with during("result"):
        result = memory_file("result")
    with open(result, "r+b", 0) as file:
        file.truncate(RESULT_SIZE)  # all holes: what is not written takes no memory
        fcntl.fcntl(result, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        with during("call"):
            call = sealed("call", pickled)
        with open(call, "rb", 0):
            start = functools.partial(jail.start_own, "executor", {RESULT_FD: result, CALL_FD: call}, (DEVNULL, DEVNULL, PIPE))
            outcome = to_end(start)
        if not outcome.ok:
            raise RunFailed(outcome)
        size = int.from_bytes(os.pread(result, LENGTH, 0), "little")
        if not 0 < size <= RESULT_SIZE - LENGTH:
            raise JailError("the job ended without a result")
        return decode(os.pread(result, size, LENGTH))


_registry = threading.RLock()
"""One dump at a time: what another has registered must not go in the middle of it. What is dumped may dump by itself."""


def _renew_lock() -> None:
    global _registry
    _registry = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def pickler() -> Callable[[object], bytes]:
    """The caller's own modules are not inside: what is met of them goes with its code; what is of installed packages goes by name."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
        def __init__(self, file: io.BytesIO) -> None:
            super().__init__(file)
            self.registered: list[ModuleType] = []

        def reducer_override(self, met: Any) -> Any:
            if isinstance(met, (type, FunctionType, ModuleType)):
                module = met if isinstance(met, ModuleType) else sys.modules.get(getattr(met, "__module__", None) or "")
                if module is not None and own(module) and module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                    cloudpickle.register_pickle_by_value(module)
                    self.registered.append(module)
            return super().reducer_override(met)

    def pickled(value: object) -> bytes:
        with _registry, io.BytesIO() as file:
            ours = Pickler(file)
            try:
                ours.dump(value)
            finally:  # the registry is the whole process's
                for module in ours.registered:
                    cloudpickle.unregister_pickle_by_value(module)
            return file.getvalue()

    return pickled


def own(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return module.__name__ != "__main__" and file is not None and not file.startswith(installed())


@functools.cache
def installed() -> tuple[str, ...]:
    """Where modules lie that go by name: Debian's and the user's own packages, too."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(path + os.sep for path in (*paths, *site.getsitepackages(), site.getusersitepackages()))
