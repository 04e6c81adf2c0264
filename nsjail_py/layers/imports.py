"""Which installed distributions a script imports: the proposal for `imports` in a policy's [python] table.

The text of the script decides, so what is imported by a computed name is told and not found. What the distributions themselves need is
added when the jail is made (distributions.closure).
"""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from nsjail_py import distributions, interpreter, toml, tree
from nsjail_py.errors import PolicyError

from .examine import IMPORTERS, folded

if TYPE_CHECKING:
    from nsjail_py.interpreter import Interpreter

FAILURES = ("ImportError", "ModuleNotFoundError", "Exception")


class Unresolved(NamedTuple):
    """An import that no name in the list would make work."""

    line: int
    module: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.module}: {self.reason}"


class Proposal(NamedTuple):
    """What a script imports, sorted out."""

    imports: list[str]
    """Distributions to list."""
    standard: list[str]
    """Modules of the standard library, always there."""
    local: list[str]
    """Modules that lie beside the script; `project` in the policy shows them."""
    optional: list[str]
    """Modules that are not there, and that the script can do without: it catches their ImportError."""
    unresolved: list[Unresolved]

    def __str__(self) -> str:
        """Lines for a policy file."""
        notes = []
        for names, text in (
            (self.standard, "standard library, always there"),
            (self.local, "beside the script: show their directory with `project` or --project"),
            (self.optional, "not installed, and the script catches that"),
        ):
            notes += [f"{text}: {', '.join(names)}"] if names else []
        notes += [f"NOT RESOLVED: {one}" for one in self.unresolved]
        return "\n".join([f"imports = {toml.array(self.imports)}", *(f"# {toml.comment(note)}" for note in notes)])


class Import(NamedTuple):
    """One import in the text. `module` is empty where its name is computed."""

    module: str
    line: int
    optional: bool


def propose(source: str | bytes, *, interpreter: str | None = None, project: Iterable[str] = ()) -> Proposal:
    """What the script needs. interpreter: path of the one whose packages count. project: directories of the script's own modules.
    Raises SyntaxError for what is no Python."""
    found = Proposal([], [], [], [], [])
    chosen = _inspect(interpreter)
    installed = _installed(chosen)
    try:
        for one in sorted(set(imports_of(source)), key=lambda one: one.line):
            _sort_out(found, one, chosen, installed, list(project))
    except (ValueError, RecursionError, MemoryError) as error:  # which the interpreter may take differently
        found.unresolved.append(Unresolved(1, "?", f"the script cannot be parsed: {str(error) or 'too deep'}"))
    for names in (found.imports, found.standard, found.local, found.optional):
        names[:] = sorted(set(names))
    return found


def imports_of(source: str | bytes) -> Iterator[Import]:
    """Every import that stands in the text, wherever it stands."""
    text = ast.parse(source)
    caught = {id(below) for node in ast.walk(text) if _catches(node) for part in node.body for below in ast.walk(part)}  # type: ignore[attr-defined]
    for node in ast.walk(text):
        optional = id(node) in caught
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import("." * node.level + (node.module or ""), node.lineno, optional)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in IMPORTERS[:2]:
            yield Import(folded(node.args[0]) if node.args else "", node.lineno, optional)


def _catches(node: ast.AST) -> bool:
    handlers = node.handlers if isinstance(node, (ast.Try, ast.TryStar)) else []
    return any(h.type is None or any(isinstance(n, ast.Name) and n.id in FAILURES for n in ast.walk(h.type)) for h in handlers)


def _sort_out(
    found: Proposal, one: Import, chosen: Interpreter, installed: dict[str, list[metadata.Distribution]], project: list[str]
) -> None:
    top = one.module.partition(".")[0]
    if not one.module:
        found.unresolved.append(Unresolved(one.line, "?", "the name is computed while the script runs"))
    elif not top:
        found.local.append(one.module)
    elif any(os.path.isfile(f"{place}/{top}.py") or os.path.isdir(f"{place}/{top}") for place in project):
        found.local.append(top)
    elif top in sys.stdlib_module_names:
        if top in tree.UNWANTED:
            found.unresolved.append(Unresolved(one.line, top, "a part of the standard library that a minimal root leaves out"))
        else:
            found.standard.append(top)
    elif top not in installed:
        if one.optional:
            found.optional.append(top)
        else:
            found.unresolved.append(Unresolved(one.line, one.module, "no installed distribution has it"))
    else:
        for distribution in _of(one.module, installed[top]):
            name = distribution.metadata["Name"]
            try:
                distributions.closure(chosen, [name])
                found.imports.append(name)
            except PolicyError as error:
                found.unresolved.append(Unresolved(one.line, one.module, str(error).removeprefix("$.python.imports: ")))


def _of(module: str, candidates: list[metadata.Distribution]) -> list[metadata.Distribution]:
    """Where several distributions share a top-level name (a namespace package): those that have the module itself."""
    path = module.replace(".", "/")
    exact = [one for one in candidates if any(str(file).startswith((f"{path}/", f"{path}.")) for file in one.files or [])]
    return exact or candidates


def _inspect(path: str | None) -> Interpreter:
    return interpreter.inspect(path)


def _installed(chosen: Interpreter) -> dict[str, list[metadata.Distribution]]:
    """Top-level module -> distributions, as importlib.metadata.packages_distributions has it, for any interpreter's search path."""
    found: dict[str, list[metadata.Distribution]] = {}
    for one in metadata.distributions(path=list(chosen.search)):
        if not one.metadata["Name"]:
            continue
        declared = (one.read_text("top_level.txt") or "").split()
        files = [file for file in one.files or [] if file.suffix in (".py", ".so") and ".." not in file.parts]
        for name in {
            *declared,
            *(file.parts[0].partition(".")[0] for file in files if not file.parts[0].endswith((".dist-info", ".data"))),
        }:
            found.setdefault(name, []).append(one)
    return found
