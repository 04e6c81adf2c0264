"""JailExecutor: concurrent.futures as everybody knows it, in jails."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import importlib
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import numpy as np
import pytest
from conftest import PATIENCE

from nsjail_py import JailError, JailExecutor, JobError, PolicyError, RunFailed, executor, executor_inside, launcher, plan, unpack


@pytest.fixture(scope="module")
def pool() -> Iterator[JailExecutor]:
    with JailExecutor("untrusted", 2, preload=["numpy"], wall_time=5.0 * PATIENCE, memory="256M") as pool:
        yield pool


def add(a: int, b: int = 1) -> int:
    return a + b


def test_functions_go_in_and_results_come_back(pool: JailExecutor) -> None:
    assert pool.submit(add, 41).result() == 42
    assert pool.submit(add, 40, b=2).result() == 42
    assert list(pool.map(add, range(10), range(10))) == [2 * n for n in range(10)]
    assert pool.submit(lambda text: text.upper(), "text").result() == "TEXT"


HELPER = """
import dataclasses, enum
class Colour(enum.Enum): red = 1
@dataclasses.dataclass
class Point:
    x: int
    def moved(self, by): return Point(self.x + by)
def add(a, b): return a + b
def point(x): return Point(add(x, 1)).x
def use(how, *arguments): return how(*arguments)
"""
WAYS = {
    "a partial": "functools.partial(helper.add, 1), 2",
    "a keyword": "functools.partial(int, base=2), '11'",
    "an argument": "functools.reduce, helper.add, [1, 2]",
    "an argument in a list": "lambda functions: functions[0](1, 2), [helper.add]",
    "an object": "operator.attrgetter('x'), helper.Point(3)",
    "a method": "helper.Point(1).moved(2).__getattribute__, 'x'",
    "a class": "lambda made: made(3).x, helper.Point",
    "a module": "lambda: helper.add(1, 2)",
    "a module of a function's": "helper.use, helper.point, 2",
    "a member of an enum": "lambda colour: colour.value + 2, helper.Colour.red",
    "a module in a closure": "(lambda module: lambda: module.point(2))(helper)",
}


@pytest.mark.parametrize("how", WAYS)
def test_what_is_of_the_callers_own_modules_goes_in_whatever_way_it_is_met(how: str, pool: JailExecutor, tmp_path: Any) -> None:
    """Each is the first of its module: what was met before does not count."""
    name = f"helper_{list(WAYS).index(how)}"
    (tmp_path / f"{name}.py").write_text(HELPER)
    sys.path.insert(0, str(tmp_path))
    try:
        call = eval(f"({WAYS[how]},)", {"helper": importlib.import_module(name), "functools": functools, "operator": operator})
        assert pool.submit(*call).result() == 3
    finally:
        sys.path.remove(str(tmp_path))


def test_what_a_call_needs_changes_nothing_for_other_users_of_cloudpickle(pool: JailExecutor, tmp_path: Path) -> None:
    for name in ("helper_used", "helper_of_the_user"):
        (tmp_path / f"{name}.py").write_text(HELPER)
    sys.path.insert(0, str(tmp_path))
    try:
        used, of_the_user = (importlib.import_module(name) for name in ("helper_used", "helper_of_the_user"))
    finally:
        sys.path.remove(str(tmp_path))
    cloudpickle.register_pickle_by_value(of_the_user)
    before = cloudpickle.list_registry_pickle_by_value()
    for _ in range(2):
        assert pool.submit(used.use, of_the_user.point, 2).result() == 3
        with pytest.raises(TypeError, match="cannot pickle"):
            pool.submit(used.use, threading.Lock())
        assert cloudpickle.list_registry_pickle_by_value() == before
    cloudpickle.unregister_pickle_by_value(of_the_user)


def test_threads_that_submit_at_one_time_all_send_their_own_modules(tmp_path: Path) -> None:
    (tmp_path / "helper_shared.py").write_text("\n".join(f"def function_{number}(): pass" for number in range(100)))
    sys.path.insert(0, str(tmp_path))
    try:
        shared = importlib.import_module("helper_shared")
    finally:
        sys.path.remove(str(tmp_path))
    functions = [getattr(shared, f"function_{number}") for number in range(100)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            pickled = list(threads.map(lambda _: executor.pickler()(functions), range(1000)))
    finally:
        sys.setswitchinterval(before)
    assert len({len(one) for one in pickled}) == 1


NUMBERS = [sign * (1 << bits) + more for bits in (7, 8, 62, 63, 64, 71, 127, 5000) for sign in (1, -1) for more in (-1, 0, 1)]
VALUES = [None, True, 1, 1.5, "täxt", b"\0bytes\xff", [1, [2, {}]], {"a": {"b": [None]}}, date(2026, 11, 24), "x" * 5_000_000]
VALUES += [1 << 64, NUMBERS, {"a": [{1: 1 << 70, 2: b"x"}, 3]}, {(1, (2.5, "x")): 1, None: 2, -1: 3, b"": 4}]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_plain_data_comes_back_as_it_was(pool: JailExecutor, value: Any) -> None:
    result = pool.submit(lambda: value).result()
    assert result == (value.isoformat() if isinstance(value, date) else value)


def test_a_number_that_has_no_way_out_is_told_with_the_limit(pool: JailExecutor) -> None:
    with pytest.raises(JobError, match=r"2\*\*64"):
        pool.submit(lambda: {1 << 64: 1}).result()


@pytest.mark.parametrize(
    "value", [np.longdouble("1.5"), np.datetime64("2026-11-24", "ns"), np.timedelta64(7, "ns"), np.timedelta64(1, "Y")]
)
def test_a_number_of_numpys_that_python_has_no_like_of_is_told_by_its_type(value: Any, pool: JailExecutor) -> None:
    with pytest.raises(JobError, match=f"a result of type numpy.{type(value).__name__} cannot leave the jail"):
        pool.submit(lambda: [value]).result()
    assert pool.submit(lambda: np.array(value)).result() == value


def test_a_result_that_is_too_large_is_told_with_the_limit(pool: JailExecutor) -> None:
    with pytest.raises(JobError, match="at most 67108856"):
        pool.submit(bytes, 65 << 20).result()


def test_arrays_come_back_whole(pool: JailExecutor) -> None:
    for array in (
        np.arange(12.0).reshape(3, 4),
        np.zeros((0, 3), "i2"),
        np.array(["a", "bc"]),
        np.array([1 + 2j]),
        np.array("2026-11-24", "M8[D]").reshape(1),
        np.array([3], "m8[25us]"),
        np.array([[True, False]]),
        np.array(["\U0010ffff"], ">U1"),
    ):
        back = pool.submit(lambda array=array: {"array": array, "n": np.int64(7)}).result()
        assert back["n"] == 7
        assert back["array"].dtype == array.dtype
        assert np.array_equal(back["array"], array)
        assert back["array"].flags.writeable


def test_an_exception_comes_with_its_traceback_as_text(pool: JailExecutor) -> None:
    def fail() -> None:
        raise KeyError("the key")

    with pytest.raises(JobError) as caught:
        pool.submit(fail).result()
    assert (caught.value.type, caught.value.message) == ("KeyError", "'the key'")
    assert "in fail" in caught.value.traceback
    with pytest.raises(JobError, match="cannot leave the jail"):
        pool.submit(lambda: object()).result()


def test_an_exception_is_told_whatever_its_text_is(pool: JailExecutor) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise SystemExit

    def fail(error: type[Exception], text: str, count: int) -> None:
        raise error(text.encode().decode("unicode_escape") * count)

    for error, text, count, message in (
        (ValueError, r"bad \ud83d", 1, r"bad \ud83d"),
        (ValueError, "x", 65 << 20, "x" * (1 << 20)),
        (Odd, "", 1, ""),
    ):
        with pytest.raises(JobError) as caught:
            pool.submit(fail, error, text, count).result()
        assert (caught.value.type.rpartition(".")[2], caught.value.message) == (error.__name__, message)


def test_a_call_that_failed_keeps_no_descriptor(pool: JailExecutor) -> None:
    before = len(os.listdir("/proc/self/fd"))
    failed = [pool.submit(int, "x") for _ in range(20)]
    wait(failed)
    assert all(future.exception() for future in failed)
    assert len(os.listdir("/proc/self/fd")) < before + 10  # those of the warm interpreter, where it is the first call


def test_a_run_that_meets_a_limit_says_which(pool: JailExecutor) -> None:
    # Without a control group it is the process that is refused more memory, and it can say so.
    with pytest.raises((RunFailed, JobError)) as hungry:
        pool.submit(lambda: bytearray(1 << 30).count(1)).result()
    if isinstance(hungry.value, JobError):
        assert (hungry.value.type, launcher.current().claim.kind) == ("MemoryError", "none")
    else:
        assert hungry.value.result.verdict in ("memory", "signal", "exit")
    with pytest.raises(RunFailed) as caught:
        pool.submit(os._exit, 3).result()
    assert (caught.value.result.verdict, caught.value.result.exit_code) == ("exit", 3)


def test_the_jail_is_a_jail(pool: JailExecutor) -> None:
    def look() -> list[Any]:
        import socket

        found: list[Any] = [sorted(os.environ.get("CANARY", "")), os.listdir("/work")]
        for attempt in (lambda: socket.socket(), lambda: os.fork(), lambda: open("/usr/x", "w"), lambda: os.listdir("/home")):
            try:
                attempt()
                found.append("done")
            except OSError as error:
                found.append(error.errno in (1, 2, 13, 30))
        return found

    os.environ["CANARY"] = "secret"
    assert pool.submit(look).result() == [[], [], True, True, True, True]


def test_nothing_that_a_job_writes_is_unpickled(pool: JailExecutor, tmp_path: Any) -> None:
    canary = tmp_path / "canary"

    def spoof(data: bytes) -> None:
        os.pwrite(3, len(data).to_bytes(8, "little") + data, 0)
        os._exit(0)

    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    hostile = [pickle.dumps(Bomb()), b"", b"\xc1", b"\x93\x00", bytes(100), b"\x92\x00\xc7\x05\x01\x93\xa1O\x91\x01\xc4\x00"]
    for data in hostile:
        with pytest.raises(JailError):
            pool.submit(spoof, data).result()
    assert not canary.exists()
    assert pool.submit(add, 1).result() == 2


def test_what_is_decoded_is_only_data() -> None:
    def message(*parts: Any) -> bytes:
        return msgspec.msgpack.encode(parts)

    array = msgspec.msgpack.encode(("|O", (1,), b"\0" * 8))
    for data in (
        message(executor_inside.RESULT, msgspec.msgpack.Ext(1, array)),
        message(executor_inside.RESULT, msgspec.msgpack.Ext(9, b"")),
        message(7),
    ):
        with pytest.raises(JailError):
            unpack.decode(data)


def _ext(*parts: Any) -> bytes:
    data = msgspec.msgpack.encode(parts)
    return b"\xc7" + bytes([len(data), executor_inside.ARRAY]) + data


MANY = {
    "empty maps": b"\x80",
    "maps": b"\x81\x00\x00",
    "empty lists": b"\x90",
    "lists": b"\xdd\x00\x00\x00\x01\x00",
    "numbers": b"\xe0",
    "texts": b"\xa2\xc4\x80",
    "bytes": b"\xc4\x00",
    "arrays": _ext("|b1", (0,), b""),
}


@pytest.mark.parametrize("what", MANY)
def test_a_result_takes_its_reader_a_bounded_amount_of_memory(what: str) -> None:
    count = (63 << 20) // len(MANY[what])
    data = b"\x92\x00\xdd" + count.to_bytes(4, "big") + MANY[what] * count
    read = f"import sys, numpy\nfrom nsjail_py import unpack\nfrom resource import *\nsetrlimit(RLIMIT_DATA, ({2 << 30}, -1))"
    read += "\ntry: unpack.decode(sys.stdin.buffer.read())\nexcept unpack.JailError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", read], input=data, capture_output=True, timeout=60 * PATIENCE)
    assert b"more than 4194304 values" in done.stdout, done.stderr[-300:]
    assert unpack.decode(data[:3] + (1000).to_bytes(4, "big") + MANY[what] * 1000)[999] is not None


def test_every_kind_of_value_is_counted_with_its_own_length() -> None:
    for first in sorted({*range(0x80), *range(0xA0, 0xC1), *range(0xC2, 0xDC), *range(0xE0, 0x100)}):
        for length in (0, 1, 200) if first in unpack.LENGTHS else (0,):
            width, before = unpack.LENGTHS.get(first, (0, 1))
            size = before + length if first in unpack.LENGTHS else unpack.SIZES[first]
            value = (bytes([first]) + length.to_bytes(width, "big")).ljust(size, b"\1")
            assert msgspec.msgpack.decode(b"\x92" + value + b"\x07", ext_hook=lambda *_: None)[1] == 7


WRONG = {
    "nested": b"\x91" * 100_000 + b"\x00",
    "a long shape": b"\x92\x00" + _ext("|b1", (1,) * 65, b"\0"),
    "a giant shape": b"\x92\x00" + _ext("|b1", (1 << 63,), b"\0"),
    "a nameless type": b"\x92\x00" + _ext("(i4", (1,), bytes(4)),
    "no text": b"\x94\x01\xa0\xa0\xc4\x00",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_result_is_a_jail_error(what: str) -> None:
    with pytest.raises(JailError, match="cannot be read") as caught:
        unpack.decode(WRONG[what])
    assert not isinstance(caught.value, JobError)


LARGE: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bytes(range(256)) * (60 << 12),
    "text": lambda: "x" * (60 << 20),
    "an array": lambda: np.arange(60 << 17),
    "numbers": lambda: list(range(1_000_000)),
    "floats": lambda: [number / 3 for number in range(4_000_000)],
    "records": lambda: [{"name": str(number), "at": number, "rows": [number / 2, None]} for number in range(200_000)],
}


@pytest.mark.parametrize("what", LARGE)
def test_a_large_result_comes_back_as_it_was(what: str) -> None:
    value = LARGE[what]()
    back = unpack.decode(msgspec.msgpack.encode((executor_inside.RESULT, value), enc_hook=executor_inside.plain))
    assert np.array_equal(back, value) if what == "an array" else back == value


def test_cancel_timeout_and_shutdown_are_those_of_concurrent_futures() -> None:
    with JailExecutor("untrusted", 1) as pool:
        slow = pool.submit(time.sleep, 1.0)
        waiting = [pool.submit(add, n) for n in range(3)]
        with pytest.raises(TimeoutError):
            slow.result(timeout=0.05)
        assert waiting[1].cancel()
        with pytest.raises(CancelledError):
            waiting[1].result()
        assert [waiting[0].result(), waiting[2].result()] == [1, 3]
        assert {future.result() for future in as_completed([pool.submit(add, n) for n in range(3)])} == {1, 2, 3}
        assert not wait([pool.submit(add, 1)]).not_done
        running = pool.submit(time.sleep, 0.3)
        late = pool.submit(add, 1)
        time.sleep(0.1)
        pool.shutdown(cancel_futures=True)
        assert running.done() and late.cancelled()
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(add, 1)


def test_an_executor_that_is_dropped_does_what_was_submitted() -> None:
    before = threading.enumerate()
    futures = [JailExecutor("untrusted", 1).submit(add, 1)]
    pool = JailExecutor("untrusted", 1)
    futures += [pool.submit(add, number) for number in range(5)]
    del pool
    gc.collect()
    assert [future.result(30 * PATIENCE) for future in futures] == [2, 1, 2, 3, 4, 5]
    threads = [thread for thread in threading.enumerate() if thread not in before]
    for thread in threads:
        thread.join(10 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def test_the_warm_interpreter_ends_with_the_last_call_whoever_waits_for_that() -> None:
    pool = JailExecutor("untrusted", 2)
    calls = [pool.submit(time.sleep, 0.2) for _ in range(3)]
    pool.shutdown(wait=False)
    assert [call.result(30 * PATIENCE) for call in calls] == [None] * 3
    templates = pool._jail._templates
    for thread in pool._threads:
        thread.join(10 * PATIENCE)
    assert templates is not None and templates._current is None


def test_a_worker_that_waits_keeps_no_result_and_no_exception(pool: JailExecutor) -> None:
    future = pool.submit(np.zeros, 10)
    kept = [weakref.ref(future.result())]
    future = pool.submit(int, "x")
    kept.append(weakref.ref(future.exception()))
    del future
    gc.collect()
    deadline = time.monotonic() + 10 * PATIENCE
    while any(one() is not None for one in kept) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [one() for one in kept] == [None, None]


AT_EXIT = """
import nsjail_py, os, sys, time
pool = nsjail_py.JailExecutor("untrusted", 1)
for number in range(3):
    pool.submit(abs, -number).add_done_callback(lambda future: print(future.result(), flush=True))
if "--forked" in sys.argv and os.fork() == 0:
    sys.exit()
if "--slow" in sys.argv:
    pool.submit(time.sleep, 50)
    print("waits", flush=True)
"""


def test_the_end_of_the_interpreter_waits_for_what_was_submitted() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", AT_EXIT, "--forked"], capture_output=True, timeout=60 * PATIENCE)
    assert (done.stdout, done.stderr, done.returncode) == (b"0\n1\n2\n", b"", 0)


def test_an_interrupt_ends_that_wait() -> None:
    with subprocess.Popen([sys.executable, "-c", AT_EXIT, "--slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert {process.stdout.readline() for _ in range(4)} == {b"0\n", b"1\n", b"2\n", b"waits\n"}
        time.sleep(0.3 * PATIENCE)
        process.send_signal(signal.SIGINT)
        process.wait(10 * PATIENCE)


def test_a_full_queue_holds_the_submitter_back() -> None:
    with JailExecutor("untrusted", 1, pending=2) as pool:
        pool.submit(add, 1).result()
        pool.submit(time.sleep, 0.5)
        started = time.monotonic()
        for _ in range(4):
            pool.submit(add, 1)
        assert time.monotonic() - started > 0.2


def test_map_submits_no_more_than_may_wait_and_times_out_when_it_says() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[float]:
        for number in range(20):
            taken.append(number)
            yield 0.3 * PATIENCE

    with JailExecutor("untrusted", 1, pending=2) as pool:
        pool.submit(add, 1).result()
        began = time.monotonic()
        results = pool.map(time.sleep, numbers())
        assert len(taken) == 2 and time.monotonic() - began < 0.2 * PATIENCE
        assert [next(results), next(results)] == [None, None]
        assert len(taken) == 3
        results.close()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            list(pool.map(time.sleep, [PATIENCE] * 6, timeout=0.5 * PATIENCE))
        assert time.monotonic() - began < 0.8 * PATIENCE
        assert list(pool.map(add, range(6))) == [1, 2, 3, 4, 5, 6], "what has timed out is cancelled"


def test_map_waits_for_room_no_longer_than_it_may() -> None:
    with JailExecutor("untrusted", 1, pending=1) as pool:
        pool.submit(time.sleep, PATIENCE)
        waiting = pool.submit(add, 1)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            pool.map(add, range(3), timeout=0.2 * PATIENCE)
        assert time.monotonic() - began < 0.8 * PATIENCE
        assert waiting.result() == 2


def test_map_knows_chunks_as_concurrent_futures_does(pool: JailExecutor) -> None:
    assert list(pool.map(add, range(5), chunksize=2)) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="chunksize"):
        pool.map(add, range(5), chunksize=0)


def test_a_callback_may_submit_more_than_may_wait() -> None:
    with JailExecutor("untrusted", 1, pending=1) as pool:
        calls: list[Future[int]] = []
        done = threading.Event()

        def more(_: Future[None]) -> None:
            calls.extend(pool.submit(add, number) for number in range(3))
            done.set()

        pool.submit(time.sleep, 0.3 * PATIENCE).add_done_callback(more)
        pool.submit(add, 1)
        assert done.wait(30 * PATIENCE)
        assert [call.result(30 * PATIENCE) for call in calls] == [1, 2, 3]


def test_a_callback_that_raises_whatever_ends_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    def leaves(_: Future[int]) -> None:
        raise SystemExit(1)

    with JailExecutor("untrusted", 1) as pool:
        future = pool.submit(time.sleep, 0.2)
        future.add_done_callback(leaves)
        assert future.result(30 * PATIENCE) is None
        assert pool.submit(add, 1).result(30 * PATIENCE) == 2
    assert "SystemExit" in caplog.text


def test_one_text_is_no_list_of_modules() -> None:
    with pytest.raises(PolicyError, match="preload = 'numpy': a list of modules, not one text"):
        JailExecutor("untrusted", 1, preload="numpy")


def test_a_thread_that_cannot_be_started_costs_one_call_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    with JailExecutor("untrusted", 1) as pool:
        monkeypatch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(add, 1)
        assert pool._queue.size == 0
        assert pool.submit(add, 1).result(30 * PATIENCE) == 2


def test_threads_take_turns() -> None:
    with JailExecutor("untrusted", 1, pending=100) as pool:
        pool.submit(add, 1).result()
        block = pool.submit(time.sleep, 0.3)
        order: list[str] = []

        def many(name: str, count: int) -> None:
            for _ in range(count):
                pool.submit(add, 1).add_done_callback(lambda _: order.append(name))

        first = threading.Thread(target=many, args=("first", 20))
        first.start()
        first.join()
        second = threading.Thread(target=many, args=("second", 2))
        second.start()
        second.join()
        block.result()
        pool.shutdown()
        assert order.index("second") <= 2


def test_an_event_loop_can_use_it(pool: JailExecutor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(pool, add, n) for n in range(4)))

    assert asyncio.run(main()) == [1, 2, 3, 4]


def test_bad_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        JailExecutor("untrusted", 0)
    with pytest.raises(PolicyError):
        JailExecutor("no such policy")
    with pytest.raises(PolicyError, match="no installed distribution"):
        JailExecutor("untrusted", preload=["no_such_module"])


def reply(value: bytes) -> bytes:
    return b"\x92\x00" + value


def with_keys(keys: list[bytes]) -> bytes:
    return reply(b"\xdf" + len(keys).to_bytes(4, "big") + b"".join(key + b"\xc0" for key in keys))


def tuples_of_one_hash(count: int) -> list[bytes]:
    """Pairs that lead Objects/tupleobject.c to one state after their second number."""
    bits, first, second, start = 1 << 64, 11400714785074694791, 14029467366897019727, 2870177450012600261
    keys, number = [], 0
    while len(keys) < count:
        number += 1
        state = (start + number * second) % bits
        state = (state << 31 | state >> 33) * first % bits
        other = (77 - state) * pow(second, -1, bits) % bits
        if other < sys.hash_info.modulus:
            keys.append(msgspec.msgpack.encode((number, other)))
    assert len({hash(msgspec.msgpack.decode(key, type=tuple)) for key in keys}) == 1
    return keys


def numbers_that_lead_through_each_other() -> list[bytes]:
    """Each has a hash of its own: 20,000 take the places of a table that follow each other, and the rest begins at the first of them."""
    mask = (1 << 15) - 1
    chain = [1]
    while len(chain) < 20_000:
        chain.append((5 * chain[-1] + 1) & mask)
    taken, late = set(chain), list[int]()
    for number in range(1 << 15, 1 << 20):
        place, rest = number & mask, number
        while place in taken and rest:
            rest >>= 5
            place = (5 * place + rest + 1) & mask
        if place in taken:
            late.append(number)
    return [msgspec.msgpack.encode(number) for number in (*chain, *late[:1_800])]


def wide(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\xc7" + bytes([len(data), executor_inside.INTEGER]) + data


COLLIDING: dict[str, Callable[[], list[bytes]]] = {
    "tuples": lambda: tuples_of_one_hash(2000),
    "tuples beside text": lambda: [b"\xa5%05d" % n for n in range(2000)] + tuples_of_one_hash(2000),
    "wide numbers": lambda: [wide(n * sys.hash_info.modulus) for n in range(1, 2000)],
    "numbers": numbers_that_lead_through_each_other,
    "one number": lambda: [b"\x07"] * 2000,
}


@pytest.mark.parametrize("what", COLLIDING)
def test_keys_that_a_dictionary_would_be_slow_with_are_no_result(what: str) -> None:
    with pytest.raises(JailError, match="keys of a dictionary that collide"):
        unpack.decode(with_keys(COLLIDING[what]()))


HONEST: dict[str, Callable[[], Any]] = {
    "a million numbers": lambda: {number: number for number in range(1_000_000)},
    "numbers far apart": lambda: dict.fromkeys(number * 0x9E3779B97F4A7C15 % (1 << 63) for number in range(50_000)),
    "numbers with zeros at their end": lambda: {number << 32: None for number in range(100_000)},
    "negative numbers": lambda: dict.fromkeys(range(-50_000, 0)),
    "a grid": lambda: {(x, y, 0.5): x * y for x in range(-100, 100) for y in range(-100, 100)},
    "fractions": lambda: {number / 1024: number for number in range(50_000)},
    "powers of two": lambda: {2.0**number: number for number in range(-1074, 1024)},
    "text and numbers": lambda: {key: None for number in range(20_000) for key in (number, str(number), b"%d" % number)},
}


@pytest.mark.parametrize("what", HONEST)
def test_keys_as_people_have_them_come_back_as_they_were(what: str) -> None:
    value = HONEST[what]()
    assert list(unpack.decode(msgspec.msgpack.encode((executor_inside.RESULT, value))).items()) == list(value.items())


@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1x", b"\xdc\x00\x01", b"\x81\x91"], ids=["lists", "maps", "large lists", "keys"])
def test_a_result_is_nested_as_deep_as_any_callers_stack_bears(level: bytes) -> None:
    read = "import sys\nfrom nsjail_py import unpack\nsys.setrecursionlimit(10**8)"
    read += "\ntry: unpack.decode(sys.stdin.buffer.read())\nexcept unpack.JailError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", read], input=reply(level * 1_000_000), capture_output=True, timeout=60 * PATIENCE)
    assert b"more than 200 levels" in done.stdout, (done.returncode, done.stderr[-300:])


def test_what_is_nested_two_hundred_times_comes_back_as_it_was() -> None:
    value: Any = 1
    for _ in range(199):
        value = [value]
    assert unpack.decode(msgspec.msgpack.encode((executor_inside.RESULT, value))) == value


def test_what_ends_too_early_is_no_result_and_its_keys_are_not_tried() -> None:
    whole = msgspec.msgpack.encode((executor_inside.RESULT, [dict.fromkeys(range(20), "x"), b"y" * 300, [1.5] * 256, 1 << 40]))
    assert unpack.decode(whole)
    for end in range(len(whole)):
        with pytest.raises(JailError, match="cannot be read"):
            unpack.decode(whole[:end])
    with pytest.raises(JailError, match="too early"):
        unpack.decode(with_keys([b"\x07"] * 2000)[:-1])


def array(kind: str, shape: tuple[int, ...], raw: bytes) -> bytes:
    data = msgspec.msgpack.encode((kind, shape, raw))
    return b"\xc7" + bytes([len(data), executor_inside.ARRAY]) + data


@pytest.mark.parametrize("one", [array("|u1", (1,), b"a"), b"\xc8\x00\x00\x01", b"\xc9\x00\x00\x00\x00\x01", b"\xd4\x01\x00"])
def test_arrays_are_counted_by_what_it_takes_to_make_them(one: bytes) -> None:
    count = unpack.MOST_VALUES // unpack.NUMPY_COUNT
    with pytest.raises(ValueError, match="an array counts as 100"):
        unpack.check(reply(b"\xdd" + count.to_bytes(4, "big") + one * count))
    count = unpack.MOST_VALUES // (2 * unpack.NUMPY_COUNT)
    unpack.check(reply(b"\xdd" + count.to_bytes(4, "big") + one * count))


def test_times_and_wide_numbers_are_not_counted_as_arrays() -> None:
    for one in (wide(1 << 70), msgspec.msgpack.encode(datetime(2026, 11, 24, tzinfo=UTC))):
        unpack.check(reply(b"\xdd" + (500_000).to_bytes(4, "big") + one * 500_000))


def test_an_array_of_booleans_has_no_third_value(pool: JailExecutor) -> None:
    def spoof(data: bytes) -> None:
        os.pwrite(3, len(data).to_bytes(8, "little") + data, 0)
        os._exit(0)

    back = pool.submit(spoof, reply(array("|b1", (2, 2), b"\x00\x01\x02\xff"))).result()
    assert back.view("u1").tolist() == [[0, 1], [1, 1]]
    assert back.flags.writeable


@pytest.mark.parametrize("order", "<>")
def test_an_array_of_text_has_no_character_beyond_unicode(order: str) -> None:
    for code in (0x110000, 0xFFFFFFFF):
        with pytest.raises(JailError, match="not Unicode"):
            unpack.decode(
                reply(array(f"{order}U2", (1,), b"".join(n.to_bytes(4, "little" if order == "<" else "big") for n in (65, code))))
            )


def test_what_a_job_writes_as_its_result_is_no_program() -> None:
    def attack() -> list[int] | None:
        import fcntl

        os.pwrite(3, b"#!/bin/true\n", 0)
        found = [os.stat(descriptor).st_mode & 0o111 for descriptor in (3, 4)]
        if fcntl.fcntl(3, 1034) & 0x20:  # F_GET_SEALS, F_SEAL_EXEC: from Linux 6.3 on
            for descriptor in (3, 4):
                try:
                    os.fchmod(descriptor, 0o700)
                except PermissionError:
                    found.append(0)
        try:
            os.execv("/proc/self/fd/3", ["x"])
        except PermissionError:
            return found

    with JailExecutor("moderate", 1) as pool:
        assert set(pool.submit(attack).result()) == {0}


def test_a_kernel_without_that_seal_gives_a_memory_file_that_is_no_program_either(monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & plan.MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    with open(plan.sealed("call", b"x"), "rb", 0) as file:
        assert os.stat(file.fileno()).st_mode & 0o777 == 0o600
    with JailExecutor("untrusted", 1) as pool:
        assert pool.submit(add, 1).result() == 2
