"""The import hook, as applications have it: an allow-list asked by `__import__` and by a finder. For comparison in the layers' report.

What it cannot do: modules that are loaded already are attributes of allowed ones. Its source runs alone; it stays away from the package.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable
from typing import Any


class ImportHook:
    """While it is entered, code without a module of its own (no `__spec__`) imports allowed modules only, and nobody imports a module that
    is neither allowed nor of the standard library."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self.allowed = frozenset(allowed)
        self.usual = builtins.__import__

    def __enter__(self) -> ImportHook:
        self.usual = builtins.__import__
        builtins.__import__ = self.guarded_import
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *error: object) -> None:
        builtins.__import__ = self.usual
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def guarded_import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if not (globals and globals.get("__spec__")):
            self.check(name)
        return self.usual(name, globals, locals, fromlist, level)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] not in sys.stdlib_module_names:
            self.check(name)

    def check(self, name: str) -> None:
        if type(name) is not str or name.partition(".")[0] not in self.allowed:
            raise ImportError(f"import of {str(name)!r} is not allowed here: add it to the allow-list if it is harmless")
