"""Installed distributions and what they depend on, as the files that pip recorded. packaging.python.org: recording installed projects"""

from __future__ import annotations

import difflib
import importlib.metadata as metadata
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from .errors import PolicyError

if TYPE_CHECKING:
    from .interpreter import Interpreter

_EXTRA = re.compile(r"\bextra\s*(==|in\b)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Distribution(NamedTuple):
    """One installed distribution."""

    name: str
    version: str
    folder: str
    """The site directory that it is installed in."""
    record: str
    """Path of its RECORD."""


def normal(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(interpreter: Interpreter, names: Iterable[str]) -> list[Distribution]:
    """These distributions and all that they require and is installed, sorted by name. names: of distributions, or of what they let one
    import. Raises PolicyError for one that is not there or cannot be shown."""
    installed: dict[str, metadata.Distribution] = {}
    for found in metadata.distributions(path=list(interpreter.search)):
        if found.metadata["Name"]:
            installed.setdefault(normal(found.metadata["Name"]), found)
    chosen: dict[str, Distribution] = {}
    rest = [_resolve(name, installed) for name in names]
    while rest:
        name = rest.pop()
        if name in chosen:
            continue
        chosen[name] = _describe(installed[name])
        for requirement in installed[name].requires or []:
            match = _NAME.match(requirement)
            if match and not _EXTRA.search(requirement.partition(";")[2]) and normal(match[0]) in installed:
                rest.append(normal(match[0]))
    return [chosen[name] for name in sorted(chosen)]


def _resolve(name: str, installed: dict[str, metadata.Distribution]) -> str:
    if normal(name) in installed:
        return normal(name)
    for key, found in installed.items():  # PIL -> pillow
        if name in (found.read_text("top_level.txt") or "").split() or any(
            file.parts[0] in (name, f"{name}.py") for file in found.files or [] if file.parts
        ):
            return key
    near = difflib.get_close_matches(normal(name), installed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; pip install {name}"
    raise PolicyError(f"$.python.imports: distribution {name!r} is not installed{hint}")


def _describe(found: metadata.Distribution) -> Distribution:
    name, folder = found.metadata["Name"], str(found.locate_file(""))
    direct = found.read_text("direct_url.json") or ""
    if '"editable": true' in direct or '"editable":true' in direct:
        raise PolicyError(
            f"$.python.imports: {name!r} is an editable install, so its files are elsewhere; show them with --project or a mount"
        )
    record = next((str(found.locate_file(file)) for file in found.files or [] if file.name == "RECORD"), "")
    if not record or not os.path.isfile(record):
        raise PolicyError(f"$.python.imports: {name!r} was installed without a list of its files (by apt?); install it with pip")
    return Distribution(name, found.version, folder, record)


def files(distribution: Distribution) -> list[tuple[str, str]]:
    """(path on the host, path relative to the site directory) of every file inside the site directory."""
    import csv

    listed = []
    with open(distribution.record, newline="") as file:
        for row in csv.reader(file):
            relative = os.path.normpath(row[0]) if row else ""
            if relative and not relative.startswith(("..", "/")):
                path = os.path.join(distribution.folder, relative)
                if os.path.isfile(path):
                    listed.append((path, relative))
    return listed
