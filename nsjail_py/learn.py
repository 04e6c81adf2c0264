"""The smallest policy that runs what was observed (observe.py), as a file with a reason beside each entry.

A file of the host is shown when the sample opened or looked at it, could read it, and the minimal root does not have it. A call is
allowed by its name, or where only sets allow it, by the smallest one whose conditions the observed arguments fulfil. What no policy should
give is a comment.
"""

from __future__ import annotations

import importlib.metadata as metadata
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from . import distributions, elf, interpreter, syscalls, tree
from .errors import PolicyError
from .observe import START, Call, Observation, merge, observe, readable
from .oneline import one_line
from .result import Result
from .rootfs import PRIVATE, is_below
from .toml import array, comment, string
from .units import format_size, format_time

KERNEL = ("proc", "dev", "sys", "run")
"""Places of which a minimal root has its own, or none."""
NOT_MISSED = ("/usr/lib/locale", "/usr/share/locale", "/usr/lib/x86_64-linux-gnu/gconv", "/usr/share/zoneinfo", "/etc/localtime")
"""Looked for by every C library, and done without."""
MANY = 8
"""From so many files of one directory on, the directory is shown."""
WIDTH = 100


class Reason(NamedTuple):
    """An entry of the policy, and what it is there for."""

    entry: str
    why: str


class View(NamedTuple):
    """What has to be visible."""

    imports: list[Reason]
    mounts: list[Reason]
    notes: list[str]


class Learned(NamedTuple):
    """A policy that was learned."""

    text: str
    seen: Observation
    result: Result
    """Of the last run under observation."""


def learn(
    source: bytes,
    args: Sequence[str] = (),
    *,
    name: str = "main.py",
    python: str | None = None,
    input: bytes | None = None,
    earlier: Sequence[Observation] = (),
    **changes: Any,
) -> Learned:
    """Runs a trusted script twice, and gives the policy for it and for what was observed earlier. The first run finds what it has to see;
    the second, which sees nothing else, which calls it makes then. changes: `project`, `mounts`, `env`, `env_pass`. Raises as Jail does."""
    common: dict[str, Any] = {"name": name, "python": python, "input": input}
    first, _ = observe(source, args, **common, **changes)
    idle, _ = observe(b"", name=name, python=python)
    shown = view(merge([*earlier, first]), idle)
    mounts = [{"source": one.entry, "target": inside(one.entry)} for one in shown.mounts]
    narrow = {"root": "minimal", "imports": [one.entry for one in shown.imports], "mounts": mounts}
    second, result = observe(source, args, **common, **(changes | narrow | {"mounts": [*changes.get("mounts", ()), *mounts]}))
    second.mounts = first.mounts
    first.outcome = []
    seen = merge([*earlier, first, second, msgspec.structs.replace(idle, outcome=[], samples=[])])
    return Learned(text(seen, shown), seen, result)


# ---------------------------------------------------------------- what it sees


def inside(path: str) -> str:
    """A path of the host with its first component as the minimal root has it: /lib/x is /usr/lib/x where /lib is a link."""
    top, _, rest = path.lstrip("/").partition("/")
    return f"{os.path.realpath('/' + top)}/{rest}" if rest and top in tree.MERGED else path


def view(seen: Observation, idle: Observation) -> View:
    """What the minimal root lacks. idle: what an empty script opens, which runs without."""
    found = interpreter.inspect(seen.python)
    shown = View([], [], [])
    _imports(shown, seen, found)
    root = tree.python_tree(found, tuple(one.entry for one in shown.imports)).path
    known = [mount.target for mount in seen.mounts] + ["/project", *found.search]
    wanted: dict[str, str] = {}
    looked = []
    for path, file in sorted(seen.files.items()):
        top = path.split("/")[1]
        if any(is_below(path, one) for one in known) or (path in idle.files and file.uses <= idle.files[path].uses):
            continue
        if "write" in file.uses and top not in PRIVATE:
            shown.notes.append(f"changed {path}: nothing of the host could be changed under observation; --bind {path}:{path}:rw lets it")
        elif top in PRIVATE or top in KERNEL or any(is_below(path, place) for place in NOT_MISSED):
            missing = "/sys" if top == "sys" else next((place for place in NOT_MISSED if is_below(path, place)), "")
            note = f"read files of {missing}: they are not shown, and can mostly be done without"
            shown.notes.extend([note] if missing and note not in shown.notes else [])
        elif (root / inside(path).lstrip("/")).exists() or not os.path.exists(path):
            continue
        elif "list" in file.uses and not file.uses & {"read", "execute"}:
            shown.notes.append(f"listed {path}: it is not shown; a mount of this directory shows all that is in it")
        elif file.uses == {"look"} and os.path.isdir(path):
            looked.append(path)
        elif readable(path, os.geteuid() == 0):
            also = _with(path, root) if "execute" in file.uses else ()
            wanted |= dict.fromkeys((path, *also), f"{'/'.join(sorted(file.uses))}: {file.phase}")
    shown.mounts.extend(_gathered(wanted))
    for path in looked:
        if not any(is_below(one, path) for one in (*known, *(inside(mount.entry) for mount in shown.mounts))):
            shown.notes.append(f"looked at {path}: it is not shown; a mount of this directory shows all that is in it")
    return shown


def _with(path: str, root: Path) -> Iterator[str]:
    """What the kernel opens together with a program: the interpreter that its first line names, and the loader."""
    for program in (path, *tree.shebang(path)):
        for one in (program, elf.loader(program)):
            if one and one != path and not (root / inside(one).lstrip("/")).exists():
                yield one


def _gathered(wanted: dict[str, str]) -> Iterator[Reason]:
    """Many files of one directory of data as the directory."""
    folders: dict[str, list[str]] = {}
    for path in wanted:
        folders.setdefault(os.path.dirname(path), []).append(path)
    for folder, paths in folders.items():
        if len(paths) >= MANY and folder.count("/") > 2 and not any("execute" in wanted[path] for path in paths):
            yield Reason(folder, f"{len(paths)} files of it; {wanted[paths[0]]}")
        else:
            yield from (Reason(path, wanted[path]) for path in paths)


def _imports(shown: View, seen: Observation, found: interpreter.Interpreter) -> None:
    """The distributions that opened files belong to; one that another requires is not named again."""
    owners: dict[str, str] = {}
    for one in metadata.distributions(path=list(found.search)):
        paths = (_source(str(one.locate_file(file))) for file in one.files or ())
        owners |= dict.fromkeys(paths, one.metadata["Name"])  # which is parsed anew whenever it is asked for
    first: dict[str, str] = {}
    for path, file in sorted(seen.files.items(), key=lambda item: (len(item[0]), item[0])):
        if any(is_below(path, place) for place in found.search) and (owner := owners.get(_source(path))):
            first.setdefault(owner, f"{file.phase}: {path}")
    closures: dict[str, set[str]] = {}
    for name in first:
        try:
            closures[name] = {distributions.normal(one.name) for one in distributions.closure(found, [name])}
        except PolicyError as error:
            shown.notes.append(str(error))
    for name in sorted(closures):
        normal = distributions.normal(name)
        if not any(
            normal in closure and distributions.normal(other) not in closures[name] for other, closure in closures.items() if other != name
        ):
            shown.imports.append(Reason(name, first[name]))


def _source(path: str) -> str:
    """The .py that a compiled module was made from."""
    folder, name = os.path.split(path)
    return f"{os.path.dirname(folder)}/{name.partition('.')[0]}.py" if name.endswith(".pyc") else path


# ---------------------------------------------------------------- what it calls


def allowed(seen: Observation) -> tuple[list[Reason], list[str]]:
    """The entries of `[syscalls] allow`, and what no policy gives."""
    entries: dict[str, Reason] = {}
    notes = []
    for name, call in sorted(seen.calls.items(), key=lambda item: (item[1].phase != START, item[1].phase, item[0])):
        if call.refused:
            notes.append(f"{name}, {call.count} times, {_where(call)}: refused; no shipped policy has it")
            continue
        if name == "execve":
            continue
        entry, left = _entry(name, call)
        if left:
            notes.append(f"{name}, {_where(call)}: refused with these arguments, as in every policy: {_arguments(left)}")
        if entry and entry not in entries:
            entries[entry] = Reason(entry, _where(call) if entry == name else f"{name}, {_where(call)}")
    covered = {call for entry in entries if entry.startswith("@") for call in syscalls.alternatives(entry)}
    return [one for one in entries.values() if one.entry.startswith("@") or one.entry not in covered], notes


def _entry(name: str, call: Call) -> tuple[str, list[list[tuple[int, int, int]]]]:
    """What allows a call, and the arguments that it was seen with and that this does not allow."""
    choices = syscalls.only_through(name) or [name]
    best, least = "", None
    for choice in choices:
        rules = syscalls.alternatives(choice)
        left = [values for values in call.values if not any(_holds(one, values) for one in rules[name])]
        if least is None or (len(left), len(rules)) < (len(least[0]), least[1]):
            best, least = choice, (left, len(rules))
    left = least[0] if least else []
    return ("" if call.values and len(left) == len(call.values) else best), left


def _holds(alternative: tuple[syscalls.Condition, ...], values: list[tuple[int, int, int]]) -> bool:
    seen = {number: value for number, _, value in values}
    return all(number in seen and seen[number] & mask == value for number, mask, value in alternative)


def _where(call: Call) -> str:
    words = [call.phase]
    if call.first:
        words.append(f"about {call.first}")
    elif call.after:
        words.append(f"after it opened {'/'.join(call.after.rsplit('/', 2)[-2:])}")
    return ", ".join(words)


def _arguments(left: list[list[tuple[int, int, int]]]) -> str:
    return "; ".join(", ".join(f"argument {number} & {mask:#x} = {value:#x}" for number, mask, value in values) for values in left[:3])


# ---------------------------------------------------------------- the file


def text(seen: Observation, shown: View) -> str:
    """The policy as TOML. It is what policyfile.load takes, whatever the names in it."""
    calls, refused = allowed(seen)
    programs = sorted(path for path, file in seen.files.items() if "execute" in file.uses)
    own = [path for path in programs if path.split("/")[1] in ("work", "tmp")]
    inet = sorted(one for one in seen.addresses if one.startswith("inet"))
    lines = [f"# Learned by `nsjail-py learn` from {_comment(', '.join(seen.samples))}: what these runs needed, and nothing else."]
    lines += [f"#   {_comment(one)}" for one in seen.outcome]
    lines += ["# Read it before you use it. What other input needs is not in it: learn from more runs (--seen), or ask `nsjail-py why`."]
    lines += [f"# - {_comment(one)}" for one in [*shown.notes, *refused]]
    lines += ["", 'extends = "untrusted"', f"description = {string(one_line(f'Learned from {chr(44).join(seen.samples)}'))}"]
    if own:
        lines.append(f"exec_in_writable = true # it executed {_comment(own[0])}")
    if inet:
        lines.append(f"loopback = true # {_comment(', '.join(inet[:4]))}; there is no other network")
        lines.append("landlock = false # Landlock refuses TCP; so this second layer of the file system view is missing, too")
    if seen.env_pass:
        lines.append(f"env_pass = {array(seen.env_pass)} # as they were passed on")
    chosen = seen.python if seen.python != sys.executable else None
    lines += ["", "[python]"] if shown.imports or seen.project or chosen else []
    if chosen:
        lines.append(f"interpreter = {string(chosen)}")
    if seen.project:
        lines.append(f"project = {string(seen.project)}")
    if shown.imports:
        lines += ["imports = [", *(f"    {string(one.entry)}, # {_comment(one.why)}" for one in shown.imports), "]"]
    lines += ["", "[syscalls]"]
    lines.append(f"exec = {'true # ' + _comment(', '.join(programs)) if programs else 'false'}")
    lines += ["allow = [", *_listed(calls), "]", "", "[limits]", *_limits(seen)]
    lines += ["", "[env]", *(f"{string(name)} = {string(value)}" for name, value in seen.env.items())] if seen.env else []
    for mount in seen.mounts:
        lines += ["", "[[mounts]]", f"source = {string(mount.source)}", f"target = {string(mount.target)}"]
        lines += ["writable = true # as it was bound"] if mount.writable else []
    for one in shown.mounts:
        lines += ["", f"[[mounts]] # {_comment(one.why)}", f"source = {string(one.entry)}", f"target = {string(inside(one.entry))}"]
    return "\n".join(lines) + "\n"


def _listed(calls: list[Reason]) -> Iterator[str]:
    """The start of the interpreter in a few lines; of all else, the reason."""
    starting = [one.entry for one in calls if one.why.startswith(START) and not one.entry.startswith("@")]
    if starting:
        yield "    # the interpreter's start"
    for first in range(0, len(starting), 8):
        yield f"    {', '.join(string(name) for name in starting[first : first + 8])},"
    for one in calls:
        if one.entry not in starting:
            yield f"    {string(one.entry)}, # {_comment(one.why)}"


def _limits(seen: Observation) -> Iterator[str]:
    """Room for a slower day and larger input, and no more."""
    unit = 16 * 2**20
    wall, cpu = max(10, math.ceil(4 * seen.wall_time)), max(5, math.ceil(4 * seen.cpu_time))
    memory = unit * max(4, math.ceil(2 * seen.memory / unit))
    yield f'wall_time = "{format_time(wall)}" # it took {seen.wall_time:.2f} s under observation'
    yield f'cpu_time = "{format_time(cpu)}" # it used {seen.cpu_time:.2f} s'
    if seen.memory:
        yield f'memory = "{format_size(memory)}" # it used {format_size(seen.memory)}'
    yield f"processes = {max(8, 2 * seen.processes)} # it had {seen.processes or 'an unknown number'} at one time, threads counted"


def _comment(value: str) -> str:
    return comment(value, WIDTH)
