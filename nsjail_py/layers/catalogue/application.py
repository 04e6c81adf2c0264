"""The application that the payloads attack: it runs a stranger's code within itself, under one layer or none, and goes on afterwards.

It is a program of its own, started for one payload and bounded by report.py. Its source text is also what runs in a jail, where the payload
shall find the same surroundings.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging  # noqa: F401  (what an application has loaded is there for its guests)
import os
import random  # noqa: F401
import subprocess  # noqa: F401
import sys
import threading
import warnings

job = json.load(sys.stdin)
settings = {"secret": os.environ.get("NSJAIL_CANARY", "none"), "debug": False}
ALLOWED = (
    *("math", "cmath", "json", "random", "re", "string", "datetime", "decimal", "fractions", "itertools", "functools", "collections"),
    *("operator", "statistics", "heapq", "bisect", "textwrap", "base64", "binascii", "hashlib", "unicodedata", "time", "typing"),
    *("dataclasses", "enum", "copy", "contextlib", "abc", "numbers", "weakref", "zlib", "numpy"),
)
MEMORY = 4 * 1024**3


class Application:
    """What strangers' code is given to work with."""

    def __init__(self, name: str) -> None:
        self.name = name

    def greet(self) -> str:
        return f"hello from {self.name}"

    def close(self) -> None:
        self.name = ""


app = Application("application")


def ordinary(source: bytes, names: dict[str, object]) -> None:
    exec(compile(source, "payload.py", "exec", dont_inherit=True), names)  # noqa: S102  (that is what it is for)


def hooked(source: bytes, names: dict[str, object]) -> None:
    from importhook import ImportHook  # type: ignore[import-not-found]

    with ImportHook(ALLOWED):
        ordinary(source, names)


def wrapped(source: bytes, names: dict[str, object]) -> None:
    import guards  # type: ignore[import-not-found]

    names["__builtins__"] = guards.wrapped_builtins(set(ALLOWED) & set(guards.FACADES), [job["directory"]])
    ordinary(source, names)


def restricted(source: bytes, names: dict[str, object]) -> None:
    import guards

    names.update(guards.restricted_globals(names, set(ALLOWED) & set(guards.FACADES), sys.stdout.write))
    exec(guards.compiled(source, "exec"), names)  # noqa: S102


def audited(source: bytes, names: dict[str, object]) -> None:
    from audithook import AuditHook  # type: ignore[import-not-found]

    sys.addaudithook(AuditHook(ALLOWED, [job["directory"]]))
    ordinary(source, names)


def audited_natively(source: bytes, names: dict[str, object]) -> None:
    import audit_inside  # type: ignore[import-not-found]

    page = os.memfd_create("audit")
    os.ftruncate(page, job["audit"]["size"])
    os.dup2(page, audit_inside.PAGE)
    os.close(page)
    audit_inside.EXTENSION = os.path.join(os.path.dirname(audit_inside.__file__), "..", "_audit.abi3.so")
    audit_inside.install(job["audit"]["refused"])
    ordinary(source, names)


LAYERS = {
    "none": ordinary,
    "import hook": hooked,
    "wrapped built-ins": wrapped,
    "RestrictedPython": restricted,
    "audit hook": audited,
    "native audit hook": audited_natively,
}


def bounded() -> None:
    import resource

    if job["layer"] != "none" or job["bounded"]:
        sys.path[:0] = job["path"]
    if job["bounded"]:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (job["processor"], job["processor"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve() -> None:
    """One request: the stranger's code, then the application's own work with its result."""
    secret = settings["secret"]
    names: dict[str, object] = {"__name__": "__main__", "app": app}
    LAYERS[job["layer"]](base64.b64decode(job["payload"]), names)
    print(str(names.get("result", "")), json.dumps({"served": app.name, "known": bool(secret)}))


warnings.simplefilter("ignore")
bounded()
try:
    serve()
except BaseException as error:
    sys.stdout = sys.__stdout__
    kind, said = type(error).__name__, str(getattr(error, "msg", error)).strip()
    os.write(2, f"\nREFUSED {kind}: {said.splitlines()[0][:200] if said else ''}\n".encode(errors="replace"))
with contextlib.suppress(BaseException):
    app.close()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(1)
if job["linger"]:
    __import__("time").sleep(job["linger"])
globals().pop("app")
os.write(2, f"\nSURVIVED {job['end']}\n".encode())
