"""Policies from TOML files, and changes to policies: every way in is checked by the same rules, and all faults are told at once.

A policy goes text -> plain tables -> (merged onto what it extends) -> `Policy`. The types in policy.py say what a field takes; what types
cannot say (targets that collide, limits that are not positive) is `problems`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import msgspec

from .errors import PolicyError, during
from .oneline import one_line
from .policy import Limits, Policy, Python
from .policycheck import mended, type_problems, value_problems
from .suggest import did_you_mean
from .units import parse_size, parse_time

Table = dict[str, Any]

TIMES = ("wall_time", "cpu_time", "idle_time")
SIZES = ("io", "memory", "file_size", "disk", "output", "stack")
UNLIMITED = "unlimited"
NOT_POLICIES = ("syscalls",)
OWN_FIELDS = ("name", "description")
"""What is said of one policy and not passed on to those that extend it."""
OF_SUBPROCESS = {
    **dict.fromkeys(("text", "encoding", "errors", "universal_newlines"), "output is bytes: result.stdout.decode()"),
    "capture_output": "output is captured unless stdout and stderr say otherwise",
    "check": "result.check() raises on anything but ok",
    "cwd": "it begins in /work, which is empty; workdir= names the directory of the host that is to be there",
    "shell": 'a shell is a program like any other: ["/bin/sh", "-c", "..."], under a policy that lets it start programs',
}
"""What people bring from subprocess.run, and what there is instead."""
PLAIN = (str, int, float, bool)
MAX_FILE = 1024**2
DEEPEST = 32
"""Tables within tables; a policy needs four."""
MOST_EXTENDED = 16


def load(name_or_path: str | os.PathLike[str]) -> Policy:
    """The shipped policy of that name, or the policy in that file (anything with a slash or ending in .toml). Raises PolicyError."""
    with during("policy"):
        path = locate(name_or_path)
        table = _read(path, ())
    table.setdefault("name", path.stem)
    return _build(table, prefix=f"{one_line(str(name_or_path))}: ")


def files(name_or_path: str | os.PathLike[str]) -> list[Path]:
    """The file of a policy that can be loaded, and those that it extends."""
    found = [locate(name_or_path)]
    while base := _parsed(found[-1].read_bytes()).get("extends"):
        found.append(_extended(found[-1], base))
    return found


def names() -> list[str]:
    """Names of the shipped policies."""
    return sorted(path.stem for path in directory().glob("*.toml") if path.stem not in NOT_POLICIES)


def source(name: str) -> str:
    """The text of a shipped policy, comments and all, to read or to start an own one from."""
    if name not in names():
        raise PolicyError(_unknown_name(name))
    return (directory() / f"{name}.toml").read_text()


def check(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a policy file, one line each; empty when it can be used."""
    try:
        load(path)
    except PolicyError as error:
        return list(error.problems)
    return []


def problems(policy: Policy) -> list[str]:
    """What is wrong with a policy, however it was made; one line each."""
    try:
        override(policy)
    except PolicyError as error:
        return list(error.problems)
    return []


def resolve(policy: Policy | str | os.PathLike[str], /, **changes: Any) -> Policy:
    """The policy that a caller means by itself, its name or its path, with changes as for `override`. Raises PolicyError."""
    if isinstance(policy, Policy):
        return override(policy, **changes)
    return override(load(policy), **changes) if changes else load(policy)


def override(policy: Policy, /, **changes: Any) -> Policy:
    """A changed copy, checked. Takes the fields of Policy, and directly those of Limits and Python; sizes and times as numbers
    or text (`memory="256M"`, `wall_time=None` for none). env is merged, mounts are appended, all else is replaced. Raises PolicyError,
    also without changes: msgspec checks nothing where a policy is made in Python."""
    table: Table = _plain(policy)
    wrong = []
    for name, value in changes.items():
        plain = _plain(value)
        inner = "limits" if name in Limits.__struct_fields__ else "python" if name in Python.__struct_fields__ else ""
        if inner:
            if isinstance(table[inner], dict):  # else that is what is wrong
                table[inner] = {**table[inner], name: plain}
        elif name == "env" and isinstance(plain, dict) and isinstance(table["env"], dict):
            table["env"] = {**table["env"], **plain}
        elif name == "mounts" and isinstance(plain, list) and isinstance(table["mounts"], list):
            table["mounts"] = [*table["mounts"], *plain]
        elif name in Policy.__struct_fields__:
            table[name] = plain
        else:
            known = (*Limits.__struct_fields__, *Python.__struct_fields__, *Policy.__struct_fields__)
            hint = f" ({OF_SUBPROCESS[name]})" if name in OF_SUBPROCESS else did_you_mean(name, known)
            wrong.append(f"$.{name}: there is no such setting{hint}")
    return _build(table, also=wrong)


@cache
def directory() -> Path:
    """Where the shipped files are: in the package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return next((place for place in (package / "policies", package.parent / "policies") if place.is_dir()), package / "policies")


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that a name or a path means."""
    text = os.fspath(name_or_path)
    if not isinstance(text, str):
        raise PolicyError(f"{text!r}: a policy is a name or a path, as text")
    if "/" in text or text.endswith(".toml") or not isinstance(name_or_path, str):
        return Path(text)
    path = directory() / f"{text}.toml"
    if text in NOT_POLICIES or not path.is_file():
        raise PolicyError(_unknown_name(text))
    return path


def _unknown_name(name: str) -> str:
    return f"{one_line(name)}: there is no policy of this name{did_you_mean(name, names())}; a file is named with a slash or .toml"


def _read(path: Path, extended_by: tuple[Path, ...]) -> Table:
    """A file's table, merged onto what it extends."""
    shown = one_line(str(path))
    try:
        where = Path(os.path.realpath(path))
        if where in extended_by:
            circle = " -> ".join(one_line(step.name) for step in (*extended_by[extended_by.index(where) :], where))
            raise PolicyError(f"{shown}: $.extends: goes round in a circle ({circle})")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise PolicyError(f"{shown}: larger than {MAX_FILE} bytes: this is no policy")
        table = dict(_parsed(data))
    except (OSError, ValueError) as error:  # an unreadable file, a NUL in the path, not UTF-8, not TOML
        if isinstance(error, PolicyError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(f"{shown}: {'cannot be read' if isinstance(error, OSError) else 'is not TOML'}: {reason}") from None
    except RecursionError:
        raise PolicyError(f"{shown}: is not TOML: nested too deeply") from None
    if "extends" not in table:
        return table
    if len(extended_by) >= MOST_EXTENDED:
        raise PolicyError(f"{shown}: $.extends: more than {MOST_EXTENDED} policies, each extending the next")
    base = table.pop("extends")
    if not isinstance(base, str):
        raise PolicyError(f"{shown}: $.extends: must be the name of a policy or the path of a file")
    try:
        below = _read(_extended(path, base), (*extended_by, where))
    except PolicyError as error:
        raise PolicyError(*(f"{shown}: $.extends: {problem}" for problem in error.problems)) from None
    return _merged({key: value for key, value in below.items() if key not in OWN_FIELDS}, table)


def _extended(path: Path, base: str) -> Path:
    """What `extends` means in a file."""
    return path.parent / base if "/" in base or base.endswith(".toml") else locate(base)


@lru_cache(maxsize=16)
def _parsed(data: bytes) -> Table:
    """Nobody changes it: most runs name the same policy, and to parse it takes as long as half a run."""
    table = tomllib.loads(data.decode())
    if _depth(table) > DEEPEST:
        raise RecursionError
    return table


def _depth(value: object) -> int:
    """Of tables and lists; dotted keys make them deeper than Python's stack. At most one more than DEEPEST."""
    depth, level = 0, [value]
    while depth <= DEEPEST and (level := [one for one in level if isinstance(one, (dict, list))]):
        depth, level = depth + 1, [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _merged(below: Table, above: Table) -> Table:
    """Tables entry by entry; anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _build(table: Table, prefix: str = "", also: Iterable[str] = ()) -> Policy:
    """The policy that a table describes. Raises PolicyError with every problem, `prefix` before each."""
    wrong = list(also)
    limits = table.get("limits")
    if isinstance(limits, dict):
        table = {**table, "limits": _with_numbers(limits, wrong)}
    try:
        policy = msgspec.convert(table, Policy)
    except (msgspec.ValidationError, UnicodeError):
        misshapen = type_problems(table)
        wrong += [f"{place}: {fault}" for place, fault in misshapen]
        # What has the right shape is judged all the same: people want to see every fault at once.
        told = tuple(f"{place}{end}" for place, _ in misshapen for end in ":.[")
        wrong += [problem for problem in value_problems(msgspec.convert(mended(table), Policy)) if not problem.startswith(told)]
    else:
        wrong += value_problems(policy)
        if not wrong:
            return policy
    raise PolicyError(*(prefix + problem for problem in dict.fromkeys(wrong)))


def _with_numbers(limits: Table, wrong: list[str]) -> Table:
    """Limits with units made numbers; those that are none are left out, and told."""
    numbers: Table = {}
    for name, value in limits.items():
        if value is None or value == UNLIMITED:
            numbers[name] = None
            continue
        try:
            if name in TIMES:
                value = parse_time(value)
            elif name in SIZES:
                value = parse_size(value)
        except ValueError as error:
            wrong.append(f"$.limits.{one_line(str(name))}: {error}")
        else:
            numbers[name] = value
    return numbers


def _plain(value: Any) -> Any:
    """Structs, paths and tuples as the plain tables that a file would hold."""
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    return value
