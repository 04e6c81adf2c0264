"""What there is to know about a Python interpreter before it is put into a root: where it, its library and its packages lie.

The running interpreter is asked directly. Another one is run once, and its answer is kept in the cache as long as its file, its directories
of packages and the .pth files in them stay the same.
Inside, the base interpreter runs under its real path: a virtual environment is only a list of places where distributions are found.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from . import cachedir
from .digest import sha256
from .errors import PolicyError
from .prepared import prepared

OLDEST = (3, 8)
TIMEOUT = 30.0
"""Seconds that an interpreter may take to answer."""
WHERE = "$.python.interpreter"

Stamp = tuple[str, int, int]
"""A path with its size in bytes and its modification time in nanoseconds; both -1 when it does not exist."""


def stamp(path: str) -> Stamp:
    """Enough to see that a file was replaced."""
    try:
        status = os.stat(path)
    except OSError:
        return (path, -1, -1)
    return (path, status.st_size, status.st_mtime_ns)


class Interpreter(NamedTuple):
    """One interpreter, as it will be inside: under the same path as on the host."""

    executable: str
    """The real binary; that of the base when a virtual environment's was named."""
    version: str
    prefix: str
    stdlib: tuple[str, ...]
    site: str
    """Where installed distributions are put inside, so that it finds them by itself."""
    search: tuple[str, ...]
    """Where its distributions lie on the host; those of the virtual environment that was named."""


@prepared
class Answer(msgspec.Struct, frozen=True):
    """An answer kept on disk, with the stamps of the files that it holds for."""

    stamps: tuple[Stamp, ...]
    interpreter: Interpreter


def inspect(path: str | None = None) -> Interpreter:
    """The interpreter at path; the one that runs this when path is None. Raises PolicyError with one line for what is none."""
    named = path or sys.executable
    if not named:
        raise PolicyError(f"{WHERE}: this process does not know its own interpreter; name one")
    try:
        os.stat(named)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{WHERE}: {named!r}: {getattr(error, 'strerror', None) or error}") from None
    if not os.path.isfile(named) or not os.access(named, os.X_OK):
        raise PolicyError(f"{WHERE}: {named!r} is not a program that can be executed")
    named = os.path.abspath(named)
    # The environment that a link stands in decides, so the link is not resolved.
    stamps = tuple(stamp(file) for file in (named, os.path.realpath(named), f"{os.path.dirname(os.path.dirname(named))}/pyvenv.cfg"))
    return _inspect(named, stamps)


def _inspect(path: str, stamps: tuple[Stamp, ...]) -> Interpreter:
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF":
            advice = "name the real program: `python -c 'import sys; print(sys.executable)'`"
            raise PolicyError(f"{WHERE}: {path!r} is a script (a shim?); {advice}")
    if path == sys.executable:
        found = _convert(path, facts())
        if found.executable.startswith(f"{os.path.realpath(found.prefix).rstrip('/')}/bin/python"):  # not a program that embeds Python
            return found
    kept = cachedir.directory("interpreters") / f"{sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if (known := _recall(kept, stamps)) is not None:
        return known
    found = _convert(path, _ask(path))
    cachedir.write(kept, msgspec.json.encode(Answer((*stamps, *map(stamp, _deciding(found.search))), found)))
    return found


def _deciding(search: Iterable[str]) -> Iterator[str]:
    """What else a search path is made from: a .pth file names more directories. docs.python.org, module site"""
    for place in search:
        yield place
        with contextlib.suppress(OSError):
            yield from (f"{place}/{name}" for name in sorted(os.listdir(place)) if name.endswith(".pth"))


def _recall(kept: Path, stamps: tuple[Stamp, ...]) -> Interpreter | None:
    try:
        answer = msgspec.json.decode(kept.read_bytes(), type=Answer)
    except (OSError, msgspec.DecodeError):
        return None
    same = answer.stamps[: len(stamps)] == stamps and all(stamp(known[0]) == known for known in answer.stamps[len(stamps) :])
    still_there = all(map(os.path.exists, (answer.interpreter.executable, *answer.interpreter.stdlib)))
    return answer.interpreter if same and still_there else None


def facts() -> dict[str, Any]:
    """Facts about the interpreter that runs this. Its source text is also sent to others: it must run alone, on Python 3.8."""
    import site
    import sys

    version = "{}.{}".format(*sys.version_info[:2])
    lib = getattr(sys, "platlibdir", "lib")  # lib64 on Fedora
    folders = [
        f"{sys.base_prefix}/lib/python{version}",
        f"{sys.base_prefix}/{lib}/python{version}",
        f"{sys.base_exec_prefix}/{lib}/python{version}",
    ]
    sites = site.getsitepackages([sys.base_prefix])
    # Debian's own distributions are in python3/dist-packages, which its site module knows under /usr only.
    debian = [place for place in sites if place.endswith("/python3/dist-packages")]
    return {
        "implementation": sys.implementation.name,
        "executable": getattr(sys, "_base_executable", None) or sys.executable,
        "version": version,
        "prefix": sys.base_prefix,
        "stdlib": folders,
        "site": debian[0] if debian else f"{sys.base_prefix}/lib/python{version}/site-packages",
        "search": [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))],
    }


def _ask(path: str) -> dict[str, Any]:
    """Run the interpreter once, with a clean environment. Old ones must be able to say how old they are."""
    import inspect as source
    import subprocess

    script = (
        f"from __future__ import annotations\nfrom typing import Any\n{source.getsource(facts)}\nimport json\nprint(json.dumps(facts()))\n"
    )
    # -I is unknown to the oldest, so the current directory is taken out by hand
    old = f"if sys.version_info < {OLDEST}: print('\"%d.%d\"' % sys.version_info[:2]); sys.exit()"
    program = f"import sys\nsys.path.pop(0)\n{old}\nexec({script!r})\n"
    said = b""
    try:
        done = subprocess.run(
            [path, "-Es", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"LANG": "C.UTF-8"},
            cwd="/",
            timeout=TIMEOUT,
            check=False,
        )
        said = done.stderr
        answer = msgspec.json.decode(done.stdout, type=dict[str, Any] | str)
    except subprocess.TimeoutExpired:
        raise PolicyError(f"{WHERE}: {path!r} gave no answer within {TIMEOUT:g} s") from None
    except (OSError, msgspec.DecodeError):
        last = (said.decode("utf-8", "replace").strip().splitlines() or [""])[-1][:200]
        raise PolicyError(f"{WHERE}: {path!r} does not work as a Python interpreter{f': {last}' if last else ''}") from None
    if isinstance(answer, str):
        raise PolicyError(f"{WHERE}: {path!r} is Python {answer}, which is too old; {OLDEST[0]}.{OLDEST[1]} or later is needed")
    return answer


def _convert(path: str, answer: dict[str, Any]) -> Interpreter:
    if answer.get("implementation") != "cpython":
        raise PolicyError(f"{WHERE}: {path!r} is {answer.get('implementation')}; only CPython can be shown inside")
    stdlib = tuple(folder for folder in dict.fromkeys(answer["stdlib"]) if os.path.isdir(folder))
    if not any(os.path.isfile(f"{folder}/os.py") for folder in stdlib):
        raise PolicyError(f"{WHERE}: {path!r} has no standard library at {' or '.join(dict.fromkeys(answer['stdlib']))}")
    real = os.path.realpath(answer["executable"])
    return Interpreter(real, answer["version"], answer["prefix"], stdlib, answer["site"], tuple(answer["search"]))
