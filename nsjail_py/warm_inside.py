"""What a template runs, inside its jail: it imports what its jobs will need, and goes on as each of them.

Nothing of nsjail_py is here but the extension that `serve`s (native/template.c), loaded by its descriptor. In a job nothing may be left
that two jobs would share and should not: `make_unique`, and what cannot be made unique stands in docs/how-it-works.md.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import io
import linecache
import os
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

EXTENSION, REAPER, PLAN, CONTROL = 3, 4, 5, 999
PROGRAMS = 1000
"""Descriptors below are for a job's program to be given: MAX_FD_NUMBER of native/plan.h."""
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""1 while modules are loaded, since threads would not survive the fork; no job sees it."""

PLAIN = {list, dict, tuple, set, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CellType, types.ModuleType}
"""Of these every job leaves some; they have no finalizer."""
COLLECTED = 1 << 14
"""Py_TPFLAGS_HAVE_GC: a class whose objects the collector knows."""


def template(preload: list[str]) -> tuple[Any, tuple[int, ...]]:
    """The extension, when everything is loaded and nothing is in a fork's way; and the descriptors that libraries go on to need."""
    loader = importlib.machinery.ExtensionFileLoader("_template", f"/proc/self/fd/{EXTENSION}")
    extension: Any = importlib.util.module_from_spec(importlib.util.spec_from_loader("_template", loader))  # type: ignore[arg-type]
    loader.exec_module(extension)
    sys.modules.pop("_template", None)  # a job sees no module that its view does not have
    threading.excepthook = threading.__excepthook__ = show_of_thread
    os.close(EXTENSION)
    taken = take_numbers()
    for name in preload:
        importlib.import_module(name)
    rehearse()
    rehearse_failure()
    for number in taken:
        os.close(number)
    for name in ONE_THREAD:
        os.environ.pop(name, None)
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit(f"preload = {list(preload)}: these modules start threads, which no fork carries over")
    kept = left_open(preload)
    extension.flush()
    gc.collect()
    gc.freeze()
    extension.snapshot()
    return extension, kept


def take_numbers() -> list[int]:
    """All numbers that a program may be given: what a module opens and keeps open has a higher one, in the template as in its jobs."""
    taken: list[int] = []
    with contextlib.suppress(OSError):  # as many as there may be
        while not taken or taken[-1] < PROGRAMS:
            taken.append(os.dup(0))
    return taken


def left_open(preload: list[str]) -> tuple[int, ...]:
    """What libraries hold open of themselves: libffi maps its own file again for each page of closures, by a number that it keeps. A job
    has it by the same one. Anything else would be the same file in all jobs, and is refused."""
    with open("/proc/self/maps") as file:
        regions = [line.rstrip("\n").split(maxsplit=5) for line in file]
    mapped = {region[-1] for region in regions if region[1] == "r-xp"}
    kept: list[tuple[int, str]] = []
    strange: list[tuple[int, str]] = []
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        if number in (0, 1, 2, REAPER, PLAN, CONTROL):
            continue
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            path = os.readlink(f"/proc/self/fd/{number}")
            (kept if number >= PROGRAMS and path in mapped else strange).append((number, path))
    if strange:
        raise SystemExit(f"preload = {list(preload)}: these modules leave descriptors open: {', '.join(path for _, path in strange)}")
    for number, _ in kept:
        os.set_inheritable(number, False)
    return tuple(number for number, _ in kept)


def rehearse() -> None:
    """What a first run fills in lazily is there before the fork; and in a job that waits, the memory that any run writes to is its own
    already, and need not be copied while somebody waits."""
    module = prepared("rehearsal.py", [b"python3", b"-s", b"/app/rehearsal.py"])
    source = b"import sys\nclass C:\n    def f(self, x=1): return [x for x in range(9)]\nC().f()\nprint(f'{6 * 7}', end='', file=nowhere)"
    module.nowhere = io.StringIO()
    run(source, module)
    del module, sys.modules["__main__"]
    linecache.cache.clear()
    threads_left()
    flush()
    gc.collect()
    silent()


def rehearse_failure() -> None:
    """The same for a traceback: in the template only, since it is no run's way to be quick."""
    try:
        exec(compile(b"1 / 0", "rehearsal", "exec"))
    except ZeroDivisionError as error:
        traceback.format_exception(error)


def make_unique(extension: Any) -> None:
    """Random numbers that follow from a state in memory. `random` itself reseeds in every fork."""
    extension.seed(int.from_bytes(os.urandom(4)))
    loaded: dict[str, Any] = sys.modules
    if "_ssl" in loaded:
        loaded["_ssl"].RAND_add(os.urandom(32), 32.0)
    if "numpy.random" in loaded:
        loaded["numpy.random"].seed()
    if "tempfile" in loaded:
        loaded["tempfile"]._name_sequence = None
    if "uuid" in loaded:
        loaded["uuid"]._last_timestamp = None


def prepared(name: str, arguments: list[bytes]) -> Any:
    """The module that runs, when the interpreter is as `python NAME ARGUMENTS` would have it."""
    sys.orig_argv = [os.fsdecode(argument) for argument in arguments]
    sys.argv = sys.orig_argv[2:]
    sys.path[0] = "/app"
    main: Any = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = f"/app/{name}", __builtins__
    sys.modules["__main__"] = main
    return main


def run(source: bytes, main: Any) -> None:
    path = main.__file__
    linecache.cache[path] = (lambda: importlib.util.decode_source(source),)  # read when a traceback asks for it
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)


def job(
    flush_c: Callable[[], None], leave: Callable[[], None], name: str, source: bytes, arguments: list[bytes], environment: list[bytes]
) -> NoReturn:
    """Runs the source as `python NAME ARGUMENTS` would, and ends the process, or raises what an interpreter ends by."""
    if environment != known_environment:
        os.environb.clear()
        os.environb.update(dict(variable.split(b"=", 1) for variable in environment))
    main = prepared(name, arguments)
    status, interrupted = 1, False
    try:
        run(source, main)
        status = 0
    except SystemExit as error:
        status = exit_status(error.code)
    except BaseException as error:
        show(error)
        interrupted = isinstance(error, KeyboardInterrupt)
    del main
    finish()
    if not interrupted and told():
        flush_c()
        if not status:
            leave()
        os._exit(status)
    gc.unfreeze()
    sys.excepthook = lambda *_: None  # the exception has been shown
    raise KeyboardInterrupt if interrupted else SystemExit(status)


def exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def show(error: BaseException) -> None:
    """As the interpreter would: from the script's own frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code in (job.__code__, run.__code__):
        trace = trace.tb_next
    error = error.with_traceback(trace)
    hint(error)
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(error)  # the other looks for the source on the disk
    else:
        sys.excepthook(type(error), error, trace)


def show_of_thread(args: Any) -> None:
    """In the place of threading.excepthook, which looks for the source on the disk, too."""
    if args.exc_type is not SystemExit:
        print(f"Exception in thread {args.thread.name if args.thread else threading.get_ident()}:", file=sys.stderr, flush=True)
        traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)


def hint(error: BaseException) -> None:
    """Which line of the policy to change for a module that is not visible."""
    top = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and top and top not in sys.stdlib_module_names:
        error.add_note(f"Only what the policy lists is visible: [python] imports = [..., {top!r}]")


def finish() -> None:
    """What an interpreter does first at its end."""
    if threads_left():
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def threads_left() -> bool:
    return threading.active_count() > 1 or bool(threading._threading_atexits)  # type: ignore[attr-defined]


def told() -> bool:
    """Whether the job has said all that it had to say, once what is its script's own is taken apart. An interpreter takes apart what the
    template has loaded, too, for ten milliseconds and more."""
    try:
        flush()
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        sys.modules.pop("__main__", None)
        gc.collect()
        flush()
        return silent()
    except BaseException:  # a stream's, which an interpreter tells of, or a class's that cannot be looked at
        return False


def flush() -> None:
    """The standard streams, and those that the job has put into their places."""
    streams: list[Any] = [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
    for stream in streams:
        if not getattr(stream, "closed", False):
            stream.flush()


def silent() -> bool:
    """Whether nothing that the job has left is heard of at its end: by a finalizer, or by the callback of a weak reference."""
    left = gc.get_objects()
    kinds = set(map(type, left)) - PLAIN
    if any(map(has_finalizer, kinds)):
        return False
    telling = {kind for kind in kinds if issubclass(kind, (type, weakref.ref))}
    if not telling:
        return True
    some = [each for each in left if type(each) in telling]
    unseen = [each for each in some if isinstance(each, type) and not each.__flags__ & COLLECTED]
    callbacks = {id(each.__callback__) for each in some if isinstance(each, weakref.ref)}
    return not any(map(has_finalizer, unseen)) and not any(id(each) in callbacks for each in left if type(each) is not type(len))


def has_finalizer(kind: type) -> bool:
    try:
        type.__getattribute__(kind, "__del__")  # in which no metaclass has a say
    except AttributeError:
        return False
    return True


if __name__ == "__main__":
    extension, libraries = template(sys.argv[1:])
    awaited = extension.serve(CONTROL, REAPER, PLAN, libraries)
    if awaited is None:
        os._exit(0)
    known_environment = [name + b"=" + value for name, value in os.environb.items()]
    make_unique(extension)
    if not awaited:
        rehearse()
    gc.freeze()
    taken, flush_c, leave = extension.take(), extension.flush, extension.leave
    del extension
    job(flush_c, leave, *taken)
