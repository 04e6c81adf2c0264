"""Which modules of the standard library a root needs, for `stdlib = "needed"`: those that the interpreter loads to start, those that are
listed, and all that they and the chosen distributions import.

The text decides (ast): in distributions every import, in the standard library those that are made when the module is loaded. Followed
into functions, `os` alone would lead to nearly everything. Extensions have no text: a name that stands in one as a string counts.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import cython
from .errors import PolicyError
from .interpreter import TIMEOUT, WHERE, Interpreter

OURS = tuple(str(Path(__file__).parent / name) for name in ("warm_inside.py", "executor_inside.py", "layers/audit_inside.py"))
"""What starts scripts inside. What a session imports, it lists itself: `socket` is among that."""
DECIDING = (*OURS, __file__, cython.__file__)
"""Files of ours that decide what is needed."""
ERRORS = ("traceback", "linecache", "warnings")
"""What an interpreter loads to tell of an error."""
LATER = {
    "datetime": ("_strptime",),
    "time": ("_strptime",),
    "functools": ("typing", "weakref"),
    "codecs": ("encodings.*",),
    "hashlib": ("_md5", "_sha1", "_sha256", "_sha2", "_sha512", "_sha3", "_blake2"),
    "sysconfig": ("_sysconfigdata*",),
}
"""What modules import when they are used, and hardly do without; the last two by a computed name."""
SHORTEST = 5
"""Characters of a name that is hardly in other words by chance."""
MISSING = """raise ModuleNotFoundError({words!r}, name={module!r})\n"""


def module_of(path: str, folder: str) -> str:
    """The dotted name of the module that a file of a standard library is, or belongs to: `email` for email/architecture.rst."""
    *packages, file = path[len(folder) :].strip("/").removeprefix("lib-dynload/").split("/")
    packages = [name for name in packages if name != "__pycache__"]
    name = file.partition(".")[0]
    return ".".join([*packages, name] if file.endswith((".py", ".so", ".pyc")) and name != "__init__" else packages)


def needed(interpreter: Interpreter, modules: dict[str, list[str]], listed: Iterable[str], distributed: Iterable[str]) -> set[str]:
    """Names of the modules that are needed. modules: those of the standard library, with their files. listed: names that are wanted, each
    with all below it. distributed: files of distributions. Raises PolicyError for an interpreter that does not start."""
    found: set[str] = set()
    rest = [*_at_start(interpreter), *ERRORS, *(name for one in listed for name in (one, f"{one}.*"))]
    rest += [name for path in (*OURS, *distributed) for name in imports(path, "", deep=True)]
    while rest:
        name = rest.pop()
        if name.endswith("*"):
            rest += [one for one in modules if one.startswith(name[:-1])]
            continue
        parts = name.split(".")
        for one in (".".join(parts[:size]) for size in range(1, len(parts) + 1)):
            if one not in found and (one in modules or one in LATER):
                found.add(one)
                rest += LATER.get(one, ())
                for path in modules.get(one, ()):
                    rest += imports(path, one)
    return found


def imports(path: str, module: str, *, deep: bool = False) -> Iterator[str]:
    """Absolute names that a file imports, or may. deep: also in functions, and where it is run as a program."""
    if path.endswith(".so"):
        yield from _strings(Path(path).read_bytes())
    if not path.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    package = module if os.path.basename(path) == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree) if deep else _when_loaded(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            if origin and (module or not node.level):
                yield origin
                yield from (f"{origin}.{alias.name}" for alias in node.names if alias.name != "*")


def _strings(data: bytes) -> set[str]:
    """Names of modules in an extension: whole strings, or anywhere in those that Cython puts together."""
    names = {name.encode(): name for name in sys.stdlib_module_names}
    found = names.keys() & set(data.split(b"\0"))
    for text in cython.texts(data):
        found |= {name for name in names if len(name) >= SHORTEST and name in text}
    return {names[name] for name in found}


def _when_loaded(node: ast.AST) -> Iterator[ast.AST]:
    for below in ast.iter_child_nodes(node):
        program = isinstance(below, ast.If) and ast.unparse(below.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        if not program and not isinstance(below, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            yield below
            yield from _when_loaded(below)


def _at_start(interpreter: Interpreter) -> list[str]:
    command = [interpreter.executable, "-I", "-c", "import sys; print(*sys.modules)"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env={}, cwd="/", timeout=TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PolicyError(f"{WHERE}: {interpreter.executable!r} does not start: {error}") from None
    return [*done.stdout.decode("utf-8", "replace").split(), "encodings.*"]


def missing(module: str) -> str:
    """The text that stands for a module that is left out, so that its error names the line of the policy to change."""
    line = f'[python] imports = [..., "{module.partition(".")[0]}"]'
    words = f"No module named {module!r}: only the needed part of the standard library is visible; {line}"
    return MISSING.format(words=words, module=module)
