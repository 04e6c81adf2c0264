"""What there is to know about a Python interpreter before it is put into a root: where it, its library and its packages lie."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from typing import NamedTuple

from .errors import PolicyError

PROBE = """
import json, sys, sysconfig, site
base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix, "installed_base": sys.base_prefix, "installed_platbase": sys.base_exec_prefix}
own = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
v = "%d.%d" % sys.version_info[:2]
std = sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")
debian = sys.base_prefix == "/usr" and "/usr/lib/python3/dist-packages"
print(json.dumps({
    "version": v, "prefix": sys.base_prefix, "real": getattr(sys, "_base_executable", sys.executable), "search": own,
    "stdlib": [sys.base_prefix + "/lib/python" + v, sys.base_exec_prefix + "/lib/python" + v],
    "site": debian if debian and any("dist-packages" in p for p in site.getsitepackages([sys.base_prefix]))
            else sys.base_prefix + "/lib/python" + v + "/site-packages",
}))
"""

ASK = f"""
import sys
sys.path.pop(0)  # the current directory; -I, which would do it, is unknown to the oldest
if sys.version_info < (3, 8):
    print('"%d.%d"' % sys.version_info[:2]); sys.exit()
exec({PROBE!r})
"""

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


def inspect(path: str | None = None) -> Interpreter:
    """The interpreter at path; the one that runs this when path is None. Raises PolicyError with one line for what is none."""
    import sys

    named = path or sys.executable
    if not named:
        raise PolicyError("$.python.interpreter: this process does not know its own interpreter; name one")
    try:
        status = os.stat(named)
    except (OSError, ValueError) as error:
        raise PolicyError(f"$.python.interpreter: {named!r}: {getattr(error, 'strerror', None) or error}") from None
    if os.path.isdir(named) or not os.access(named, os.X_OK):
        raise PolicyError(f"$.python.interpreter: {named!r} is not a program that can be executed")
    return _inspect(os.path.abspath(named), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=32)
def _inspect(path: str, modified: int, size: int) -> Interpreter:
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF":
            raise PolicyError(f"$.python.interpreter: {path!r} is a script (a shim?); name the real program: `python -c 'import sys; print(sys.executable)'`")
    try:
        done = subprocess.run([path, "-Es", "-c", ASK], capture_output=True, text=True, env={"LANG": "C.UTF-8"}, timeout=30, check=False, cwd="/", stdin=subprocess.DEVNULL)
        facts = json.loads(done.stdout)
        if isinstance(facts, str):
            raise PolicyError(f"$.python.interpreter: {path!r} is Python {facts}, which is too old; 3.8 or later is needed")
    except PolicyError:
        raise
    except (OSError, subprocess.TimeoutExpired, ValueError):
        said = (done.stderr.strip().splitlines() or [""])[-1] if "done" in locals() else ""
        raise PolicyError(f"$.python.interpreter: {path!r} does not work as a Python interpreter{f': {said}' if said else ''}") from None
    real = os.path.realpath(facts["real"])
    stdlib = tuple(dict.fromkeys(folder for folder in facts["stdlib"] if os.path.isdir(folder)))
    if not any(os.path.isfile(f"{folder}/os.py") for folder in stdlib):
        raise PolicyError(f"$.python.interpreter: {path!r} has no standard library at {', '.join(facts['stdlib'])}")
    return Interpreter(real, facts["version"], facts["prefix"], stdlib, facts["site"], tuple(facts["search"]))
