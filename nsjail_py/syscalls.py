"""The system call filter: named sets (policies/syscalls.toml) to the bytes of a seccomp program.

What is not allowed goes to the launcher as a user notification, which counts it and answers EPERM; the kernel asks nobody about what is
allowed. libseccomp takes unknown names and contradictory rules in silence, so both are found here. seccomp(2), seccomp_unotify(2)
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import tomllib
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from .digest import sha256
from .errors import PolicyError, Unavailable
from .prepared import prepared
from .suggest import did_you_mean

if TYPE_CHECKING:
    from .policy import Syscalls

FORMAT = 3
"""Part of the cache's key: raise it when the same policy compiles to other bytes."""
MACHINES = ("x86_64", "aarch64")
"""Where argument numbers are as syscalls.toml says; s390x, for one, swaps the first two of clone."""
OTHER_TABLES = ("arguments", "absent", "never")
INT = 0xFFFFFFFF
MAX_INSTRUCTIONS = 4096 - 48
HIGHEST_TRIED = 1024
LATE = (
    "recvmsg",
    "sendmsg",
    "fstat",
    "fcntl",
    "openat",
    "fchmod",
    "close_range",
    "dup3",
    "landlock_restrict_self",
    "prlimit64",
    "clock_gettime",
    "execveat",
)
"""What a waiting jail still calls once it has its order, beside what every program may call."""
LIBRARY_PLACES = ("/lib/{}-linux-gnu", "/usr/lib/{}-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib", "/lib", "/usr/local/lib")

Condition = tuple[int, int, int]
"""Argument number, mask, value: (argument & mask) == value."""
Rules = dict[str, set[tuple[Condition, ...]]]
"""For each allowed call the alternatives, of which one must hold; the empty alternative always does."""


@prepared
class Filter(NamedTuple):
    """A compiled filter."""

    bpf: bytes
    """The program: `struct sock_filter`, 8 bytes each."""
    instructions: int
    late: tuple[int, ...]
    """The calls that the jail itself still has to make under the filter, and the program may not make freely (native/filter.c)."""
    unknown_from: int
    """The first number above all that the library knows: from there on a call is newer than the filter, and the launcher answers ENOSYS."""


def sets() -> dict[str, str]:
    """The name (without @) and the sentence of every set."""
    return {name: table["about"] for name, table in _tables().items() if name not in OTHER_TABLES}


def calls_of(syscalls: Syscalls) -> list[str]:
    """The calls that a policy allows, with or without conditions on their arguments. Raises PolicyError."""
    return sorted(_rules(syscalls))


def never() -> list[str]:
    """The calls that no shipped set has."""
    return list(_tables()["never"]["calls"])


def absent() -> list[str]:
    """The calls that seem not to exist under any filter."""
    return list(_tables()["absent"]["calls"])


def rules_of(syscalls: Syscalls) -> Rules:
    """Every call that a policy allows, with its conditions. Raises PolicyError."""
    return _rules(syscalls)


def alternatives(name: str) -> Rules:
    """What a set (`@files`) or a single call allows: for each call its alternatives, an empty one where no argument is looked at."""
    rules: Rules = {}
    for call, alternative in _expand(name, follow=True):
        rules.setdefault(call, set()).add(alternative)
    return rules


def only_through(call: str) -> list[str]:
    """The sets that allow a call with conditions of their own: it cannot be allowed by its name."""
    return [f"@{group}" for group, table in _tables().items() if call in {entry["call"] for entry in table.get("only", ())}]


def argument_rules() -> list[dict[str, Any]]:
    """The conditions that hold in whatever set a call stands: `why`, and `args` with the number of the argument by call."""
    return list(_tables()["arguments"].values())


@cache
def looked_at() -> dict[str, tuple[tuple[int, int], ...]]:
    """For each call that is allowed with conditions: the arguments that are compared, and which bits of them."""
    found: dict[str, dict[int, int]] = {}
    for name in [f"@{name}" for name in sets()]:
        for call, chosen in alternatives(name).items():
            for argument, mask, _ in itertools.chain(*chosen):
                masks = found.setdefault(call, {})
                masks[argument] = masks.get(argument, 0) | mask
    return {call: tuple(sorted(masks.items())) for call, masks in found.items()}


@lru_cache(maxsize=256)
def name_problems(syscalls: Syscalls) -> tuple[str, ...]:
    """Faults in the lists of names, each beginning with its place. Whether single names exist is found here too."""
    found = []
    known_sets = [name for name in re.findall(r"^\[([a-z-]+)\]$", _text(), re.M) if name not in OTHER_TABLES]
    for field in ("allow", "deny"):
        for index, name in enumerate(getattr(syscalls, field)):
            place = f"{field}[{index}]"
            if name.startswith("@"):
                if name[1:] not in known_sets:
                    found.append(f"{place}: {name!r} is no set{did_you_mean(name, ['@' + known for known in known_sets])}")
            elif problem := _single_problem(name, field, syscalls):
                found.append(f"{place}: {problem}")
            if field == "deny" and name in syscalls.allow:
                found.append(f"{place}: {name!r} is allowed as well")
    return tuple(found)


def compile_filter(syscalls: Syscalls) -> Filter:
    """The filter of a policy, from the cache when it was compiled before. Raises PolicyError (names) and Unavailable (no libseccomp)."""
    key = _key(syscalls)
    path = _cached(key) if key else None
    if path and (found := _restore(path)):
        return found
    compiled = _compile(syscalls)
    if path:
        _keep(path, compiled)
    return compiled


@lru_cache(maxsize=1024)  # there are 470; programs choose others at will
def name_of(nr: int) -> str:
    """The name of a system call number of this machine, for reports; `syscall 999` when nobody here knows it."""
    try:
        import pyseccomp

        return str(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, nr).decode())
    except (ImportError, RuntimeError, ValueError, OverflowError):
        return f"syscall {nr}"


# ---- names and rules


@cache
def _text() -> str:
    from .policyfile import directory

    return (directory() / "syscalls.toml").read_text()


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(_text())


@cache
def _listed() -> frozenset[str]:
    """Every call that syscalls.toml names."""
    tables = _tables().values()
    plain = {name for table in tables for name in table.get("calls", ())}
    return frozenset(plain | {entry["call"] for table in tables for entry in table.get("only", ())} | {"execve"})


def _single_problem(name: str, field: str, syscalls: Syscalls) -> str | None:
    """What is wrong with one call named by itself."""
    tables = _tables()
    holders = only_through(name)
    if name == "execve":
        contradicted = syscalls.exec if field == "deny" else not syscalls.exec
        return f"'execve' contradicts exec = {str(syscalls.exec).lower()}, which decides about it" if contradicted else None
    if name in tables["absent"]["calls"] and field == "allow":
        return f"{name!r} cannot be filtered (its flags lie in memory): it always answers ENOSYS, and programs use the older call"
    if name in tables["essential"]["calls"] and field == "deny":
        return f"{name!r} cannot be denied: no program would even start"
    if holders and field == "allow":
        return f"{name!r} is allowed through {' or '.join(holders)} only, which look at its arguments"
    if name in _listed() or _number(name) != -1:
        return None
    return f"{name!r} is no system call that libseccomp knows{did_you_mean(name, _listed())}"


def _rules(syscalls: Syscalls) -> Rules:
    """What a policy allows. Raises PolicyError for names, and for a call that is allowed with conditions and without."""
    wrong = [f"$.syscalls.{problem}" for problem in name_problems(syscalls)]
    if wrong:
        raise PolicyError(*wrong)
    rules: Rules = {}
    for name in ("@essential", *syscalls.allow):
        for call, alternative in _expand(name, follow=True):
            rules.setdefault(call, set()).add(alternative)
    for name in syscalls.deny:
        for call, alternative in _expand(name, follow=False):
            if name.startswith("@"):
                rules.get(call, set()).discard(alternative)
            else:
                rules.pop(call, None)
    rules.pop("execve", None)
    if syscalls.exec:
        rules["execve"] = {()}
    for call, alternatives in rules.items():
        if () in alternatives and len(alternatives) > 1:
            raise PolicyError(f"$.syscalls: {call} is allowed both with conditions on its arguments and without")
    return {call: alternatives for call, alternatives in rules.items() if alternatives}


def _expand(name: str, follow: bool) -> Iterator[tuple[str, tuple[Condition, ...]]]:
    """A set or a single call as pairs of a call and one alternative of its conditions."""
    if not name.startswith("@"):
        yield from ((name, alternative) for alternative in _general(name))
        return
    table = _tables()[name[1:]]
    for call in table.get("calls", ()):
        yield from ((call, alternative) for alternative in _general(call))
    for entry in table.get("only", ()):
        yield from ((entry["call"], alternative) for alternative in itertools.product(*map(_choices, entry["when"])))
    if follow:
        for included in table.get("includes", ()):
            yield from _expand(f"@{included}", follow)


def _choices(condition: dict[str, Any]) -> list[Condition]:
    """What passes. Another value differs in one bit at least."""
    argument, other = condition["arg"], condition.get("not")
    if other is not None:
        return [(argument, 1 << bit, ~other & 1 << bit) for bit in range(condition["bits"])]
    return [(argument, condition.get("mask", INT), value) for value in condition["in"]]


def _general(call: str) -> list[tuple[Condition, ...]]:
    """The alternatives that [arguments] sets for a call wherever it stands."""
    for rule in _tables()["arguments"].values():
        if call in rule["args"]:
            return [((rule["args"][call], rule.get("mask", INT), value),) for value in rule["in"]]
    return [()]


# ---- libseccomp


def _library() -> Any:
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        advice = "install libseccomp (Debian: apt install libseccomp2) and pyseccomp"
        raise Unavailable("system call filter", detail=str(error), advice=advice) from None
    return pyseccomp


def _number(name: str) -> int:
    """-1: the library does not know the name; other negative numbers: another machine's call."""
    library = _library()
    return int(library.resolve_syscall(library.Arch.NATIVE, name)) if re.fullmatch(r"\w+", name, re.A) else -1


def _compile(syscalls: Syscalls) -> Filter:
    machine = os.uname().machine
    if machine not in MACHINES:
        raise Unavailable("system call filter", detail=f"not written for {machine}", advice=f"supported: {', '.join(MACHINES)}")
    rules, library = _rules(syscalls), _library()
    if library.get_api() < 5:
        # The level is what the library found of the kernel here; the filter is installed elsewhere, where a lack is an error.
        library.set_api(5)
    program = library.SyscallFilter(library.NOTIFY)
    program.set_attr(library.Attr.ACT_BADARCH, library.KILL_PROCESS)
    with contextlib.suppress(OSError):  # older than libseccomp 2.5: a list instead of a binary tree
        program.set_attr(library.Attr.CTL_OPTIMIZE, 2)
    for call in _tables()["absent"]["calls"]:
        if (number := _number(call)) >= 0:
            program.add_rule_exactly(library.ERRNO(errno.ENOSYS), number)
    for call, alternatives in sorted(rules.items()):
        if (number := _number(call)) < 0:
            continue  # a call of another machine, or newer than this library: denied, as everything unknown
        for alternative in sorted(alternatives):
            conditions = [library.Arg(arg, library.MASKED_EQ, mask, value) for arg, mask, value in alternative]
            program.add_rule_exactly(library.ALLOW, number, *conditions)
    bpf = _export(program)
    if len(bpf) // 8 > MAX_INSTRUCTIONS:
        raise PolicyError(f"$.syscalls: the filter has {len(bpf) // 8} instructions; the kernel takes {MAX_INSTRUCTIONS}")
    late = tuple(_number(call) for call in LATE if rules.get(call) != {()})
    return Filter(bpf, len(bpf) // 8, late, _unknown_from(library))


def _export(program: Any) -> bytes:
    with open(os.memfd_create("filter", os.MFD_CLOEXEC), "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def _unknown_from(library: Any) -> int:
    for number in range(HIGHEST_TRIED, 0, -1):
        try:
            library.resolve_syscall(library.Arch.NATIVE, number)
        except ValueError:
            continue
        return number + 1
    return HIGHEST_TRIED


# ---- the cache on disk: compiling takes some 40 ms, most of it to find and load the library


def _key(syscalls: Syscalls) -> str | None:
    """What the bytes depend on; None when the library's identity is not known without loading it."""
    from importlib.util import find_spec

    machine = os.uname().machine
    binding = find_spec("pyseccomp")
    places = [Path(place.format(machine), "libseccomp.so.2") for place in LIBRARY_PLACES]
    library = next((os.path.realpath(path) for path in places if path.exists()), None)
    if library is None or binding is None or binding.origin is None:
        return None
    files = [(path, path.stat()) for path in (Path(library), Path(binding.origin))]
    identity = [(str(path), status.st_size, status.st_mtime_ns) for path, status in files]
    parts = msgspec.msgpack.encode((FORMAT, machine, identity, syscalls, _text()), order="deterministic")
    return sha256(parts).hexdigest()


def _cached(key: str) -> Path:
    from .cachedir import directory

    return directory("filters") / key


def _restore(path: Path) -> Filter | None:
    """A filter from the cache; None when there is none, or not the bytes that were written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[:32], data[32:]
    if sha256(path.name.encode() + body).digest() != digest:
        return None
    return msgspec.msgpack.decode(body, type=Filter)


def _keep(path: Path, compiled: Filter) -> None:
    """Whoever reads meanwhile finds all of it or nothing. A full disk costs time at the next start and nothing else."""
    body = msgspec.msgpack.encode(compiled)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        fresh.write_bytes(sha256(path.name.encode() + body).digest() + body)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
