"""What makes a policy senseless: its table has not the shape of policy.py (`type_problems`), or has it and yet cannot be meant
(`value_problems`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib.machinery import FrozenImporter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from . import cpuset
from .oneline import one_line
from .suggest import did_you_mean
from .units import MAX_SIZE, MAX_TIME

if TYPE_CHECKING:
    from .policy import Policy

ALWAYS_MADE = ("user", "mount", "pid")
ROOTS = ("minimal", "system", "host")
OWN_TREES = ("/work", "/tmp", "/app", "/proc", "/dev")
"""Filled by the jail itself, all the way down; but a `workdir` has what its owner put there."""
HOST_NAME_MAX = 64
"""_SC_HOST_NAME_MAX on Linux; sethostname(2)"""
MOST = {"processes": 4 * 1024**2, "open_files": 1024**2, "cpus": cpuset.MOST}
"""PID_MAX_LIMIT, what fs.nr_open begins with, and CONFIG_NR_CPUS: the kernel refuses more."""
STARTS_WITH = ("encodings",)
"""The one module of the standard library that an interpreter loads from a file, whatever it runs."""
LEAST = {"cpus": 0.01, "io": 1024**2}
"""Of a processor, a thousandth of a second in each tenth: the kernel refuses less. With less of a disk a program waits for seconds: it is
handed out a tenth of a second at one time, in pieces as large as it was asked for."""
TYPE_NAMES: dict[type, str] = {
    msgspec.inspect.IntType: "a whole number",
    msgspec.inspect.FloatType: "a number",
    msgspec.inspect.StrType: "text",
    msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.NoneType: '"unlimited"',
    msgspec.inspect.StructType: "a table",
    msgspec.inspect.DictType: "a table",
    msgspec.inspect.VarTupleType: "a list",
}


def type_problems(table: Any) -> list[tuple[str, str]]:
    """Unknown fields and values of a wrong type, at any depth: the place of each, and what is wrong there."""
    from .policy import Policy

    return list(_walk(table, msgspec.inspect.type_info(Policy), "$"))


def mended(table: Any) -> Any:
    """The table with each value of a wrong type left out, or empty where something has to stand, so that all the others can be judged."""
    from .policy import Policy

    return _mended(table, msgspec.inspect.type_info(Policy))


def value_problems(policy: Policy) -> list[str]:
    """What the types cannot say, each with its place."""
    try:
        msgspec.msgpack.encode(policy)
    except UnicodeEncodeError as error:
        return [f"$: {_shown(error.object)} is not valid Unicode (a file name that is not UTF-8?), and a policy cannot hold it"]
    found: list[str] = []
    for rule in (_names, _root, _backend, _mounts, _namespaces, _nesting, _limits, _environment, _python, _syscalls, _labels):
        found += rule(policy)
    return found


def _walk(value: Any, kind: Any, place: str) -> Iterator[tuple[str, str]]:
    info = msgspec.inspect
    kind = _something(kind, value)
    if not _fits(value, kind):
        if isinstance(kind, info.LiteralType):
            yield place, f"{_shown(value)} is not one of its values{did_you_mean(value, map(str, kind.values))}"
        else:
            yield place, f"must be {TYPE_NAMES[type(kind)]}, not {_shown(value)}"
    elif isinstance(kind, info.StructType):
        yield from _walk_struct(value, kind, place)
    elif isinstance(kind, info.DictType):
        for name, item in value.items():
            yield from _walk(name, kind.key_type, f"{place}.{one_line(str(name))}")
            yield from _walk(item, kind.value_type, f"{place}.{one_line(str(name))}")
    elif isinstance(kind, info.VarTupleType):
        for index, item in enumerate(value):
            yield from _walk(item, kind.item_type, f"{place}[{index}]")


def _walk_struct(table: dict[Any, Any], kind: msgspec.inspect.StructType, place: str) -> Iterator[tuple[str, str]]:
    fields = {field.name: field for field in kind.fields}
    for name, value in table.items():
        if name in fields:
            yield from _walk(value, fields[name].type, f"{place}.{name}")
        else:
            yield (
                f"{place}.{one_line(str(name))}",
                f"there is no such field{_home(name) or did_you_mean(name, ('extends', *fields) if place == '$' else fields)}",
            )
    for name, field in fields.items():
        if field.required and name not in table:
            yield f"{place}.{name}", "is missing"


def _home(name: Any) -> str:
    """Where a field belongs that stands in another table."""
    from .policy import Limits, Mount, Policy, Python, Syscalls

    homes = {"[limits]": Limits, "[python]": Python, "[syscalls]": Syscalls, "[[mounts]]": Mount}
    if name in ("extends", *Policy.__struct_fields__):
        return " (write it above the first [table])"
    return next((f" (write it under {home})" for home, kind in homes.items() if name in kind.__struct_fields__), "")


def _mended(value: Any, kind: Any) -> Any:
    info = msgspec.inspect
    kind = _something(kind, value)
    if isinstance(kind, info.StructType):
        given = value if isinstance(value, dict) else {}
        return {
            field.name: _mended(given.get(field.name), field.type)
            for field in kind.fields
            if field.required or (field.name in given and _fits(given[field.name], field.type))
        }
    if isinstance(kind, info.DictType):
        return {name: item for name, item in value.items() if _fits(name, kind.key_type) and _fits(item, kind.value_type)}
    if isinstance(kind, info.VarTupleType):
        return [_mended(item, kind.item_type) for item in value]
    if _fits(value, kind):
        return value
    return kind.values[0] if isinstance(kind, info.LiteralType) else ""


def _something(kind: Any, value: Any) -> Any:
    """A union here is "something or nothing"; the something gives the better message."""
    if not isinstance(kind, msgspec.inspect.UnionType):
        return kind
    return next(part for part in kind.types if isinstance(part, msgspec.inspect.NoneType) == (value is None))


def _fits(value: Any, kind: Any) -> bool:
    """Whether the value is of this kind, whatever is in it."""
    info = msgspec.inspect
    kind = _something(kind, value)
    if isinstance(kind, info.LiteralType):
        return value in kind.values
    if isinstance(kind, info.StructType | info.DictType):
        return isinstance(value, dict)
    return isinstance(value, (list, tuple)) if isinstance(kind, info.VarTupleType) else _is(value, kind)


def _is(value: Any, kind: Any) -> bool:
    info = msgspec.inspect
    number = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64
    checks: dict[type, bool] = {
        info.IntType: number,
        info.FloatType: number or isinstance(value, float),
        info.StrType: isinstance(value, str),
        info.BoolType: isinstance(value, bool),
        info.NoneType: value is None,
    }
    return checks.get(type(kind), False)


def _names(policy: Policy) -> Iterator[str]:
    if not policy.name or not policy.name.isprintable():
        yield f"$.name: {_shown(policy.name)} is not a name: printable characters are"
    size = len(policy.hostname.encode(errors="surrogateescape"))
    if not 0 < size <= HOST_NAME_MAX or "\0" in policy.hostname:
        yield f"$.hostname: must have 1 to {HOST_NAME_MAX} bytes and no NUL, not {_shown(policy.hostname)}"
    if policy.workdir is not None:
        yield from _path("$.workdir", policy.workdir)


def _root(policy: Policy) -> Iterator[str]:
    if policy.root.startswith("oci:"):
        from .oci_image import parse

        try:
            parse(policy.root)
        except ValueError as error:
            yield f"$.root: {_shown(policy.root)} {error}"
        return
    if policy.root.startswith("/"):
        yield from _path("$.root", policy.root)
        if not policy.root.strip("/"):
            yield '$.root: "/" is the host itself: write root = "host"'
    elif policy.root not in ROOTS:
        yield f"$.root: {_shown(policy.root)} is neither a known root nor an absolute path{did_you_mean(policy.root, ROOTS)}"


def _backend(policy: Policy) -> Iterator[str]:
    kind, _, runtime = policy.backend.partition(":")
    if policy.backend != "native" and (kind != "oci" or not runtime or "\0" in runtime or ("/" in runtime and not runtime.startswith("/"))):
        yield f"$.backend: {_shown(policy.backend)} is neither native nor oci:NAME with the name or the absolute path of a runtime"


def _mounts(policy: Policy) -> Iterator[str]:
    taken = [("/project", "$.python.project")] if policy.python.project is not None else []
    for index, mount in enumerate(policy.mounts):
        place = f"$.mounts[{index}].target"
        yield from _path(f"$.mounts[{index}].source", mount.source)
        wrong = list(_path(place, mount.target))
        yield from wrong
        if wrong:
            continue
        target = str(PurePosixPath(mount.target))
        if target.startswith("//"):  # POSIX lets exactly two slashes mean something else; Linux does not
            target = target[1:]
        in_workdir = policy.workdir is not None and target.startswith("/work/")
        if target == "/" or (not in_workdir and any(_below(target, tree) for tree in OWN_TREES)):
            instead = _shown(str(PurePosixPath("/data", PurePosixPath(target).name)))
            own = f"nothing can be shown at or below {', '.join(OWN_TREES)}"
            yield f"{place}: {_shown(mount.target)} is the jail's own ({own}): choose another place, such as {instead} (--bind SRC:DST)"
            continue
        for other, owner in taken:
            if _below(target, other) or _below(other, target):
                yield f"{place}: {_shown(mount.target)} collides with {other} of {owner}: one would hide the other"
        taken.append((target, f"$.mounts[{index}]"))


def _below(path: str, tree: str) -> bool:
    return path == tree or path.startswith(tree.rstrip("/") + "/")


def _path(place: str, path: str) -> Iterator[str]:
    if not path.startswith("/"):
        yield f"{place}: must be an absolute path, not {_shown(path)}"
    elif ".." in path.split("/"):
        yield f'{place}: must not have ".." in it: {_shown(path)}'
    elif "\0" in path:
        yield f"{place}: must not have a NUL character in it: {_shown(path)}"
    elif len(path) >= 4096:
        yield f"{place}: is longer than the 4095 bytes that the kernel takes"


def _namespaces(policy: Policy) -> Iterator[str]:
    missing = [name for name in ALWAYS_MADE if name not in policy.namespaces]
    if missing:
        yield f"$.namespaces: must have {', '.join(missing)}: without user, mount and pid nothing can be cleaned up for certain"
    if policy.loopback and "net" not in policy.namespaces:
        yield "$.loopback: needs a network of its own: add net to namespaces"


def _nesting(policy: Policy) -> Iterator[str]:
    """Landlock refuses every mount; a filter has rules about clone, and no second one with answers comes behind it."""
    refusing = [name for name, there in (("landlock = false", policy.landlock), ("no [syscalls]", policy.syscalls is not None)) if there]
    if policy.nested_userns and refusing:
        yield f"$.nested_userns: a jail inside is refused by what else the policy asks for: it needs {' and '.join(refusing)}"


def _limits(policy: Policy) -> Iterator[str]:
    for name in policy.limits.__struct_fields__:
        value = getattr(policy.limits, name)
        if isinstance(value, str):
            continue
        most = MAX_TIME if name.endswith("_time") else MOST.get(name, MAX_SIZE)
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            yield f'$.limits.{name}: must be more than 0 and at most {int(most)}, not {value}; no limit is "unlimited"'
        if value is not None and 0 < value < LEAST.get(name, 0):
            yield f"$.limits.{name}: must be at least {LEAST[name]}, not {value}"
    if policy.limits.cpuset is not None:
        try:
            cpuset.parse(policy.limits.cpuset)
        except ValueError as error:
            yield f"$.limits.cpuset: {_shown(policy.limits.cpuset)} {error}"


def _environment(policy: Policy) -> Iterator[str]:
    named = [(f"$.env.{one_line(str(name))}", name) for name in policy.env]
    named += [(f"$.env_pass[{index}]", name) for index, name in enumerate(policy.env_pass)]
    for place, name in named:
        if not name or "=" in name or "\0" in name:
            yield f"{place}: {_shown(name)} cannot be the name of a variable (empty, or with = or NUL in it)"
    for name, value in policy.env.items():
        if "\0" in value:
            yield f"$.env.{one_line(str(name))}: must not have a NUL character in it"


def _python(policy: Policy) -> Iterator[str]:
    for field in ("interpreter", "project"):
        path = getattr(policy.python, field)
        if path is not None:
            yield from _path(f"$.python.{field}", path)
    for index, name in enumerate(policy.python.imports):
        if not name.strip() or "\0" in name:
            yield f"$.python.imports[{index}]: {_shown(name)} cannot be the name of a distribution"
    if policy.python.stdlib == "needed" and policy.root != "minimal":
        yield "$.python.stdlib: only a minimal root is made of chosen modules"
    if policy.python.without and policy.root != "minimal":
        yield "$.python.without: only a minimal root is made of chosen modules"
    yield from _without(policy.python.without)
    if policy.python.scan_ignore:
        from .layers.rules import known

        for index, name in enumerate(policy.python.scan_ignore):
            if name not in known():
                yield f"$.python.scan_ignore[{index}]: the scan has no rule {_shown(name)}{did_you_mean(name, known())}"


def _without(modules: tuple[str, ...]) -> Iterator[str]:
    for index, name in enumerate(modules):
        if name not in sys.stdlib_module_names:
            near = did_you_mean(name, sys.stdlib_module_names)
            yield f"$.python.without[{index}]: {_shown(name)} is no module of the standard library{near}"
        elif name in STARTS_WITH or name in sys.builtin_module_names or FrozenImporter.find_spec(name):
            yield f"$.python.without[{index}]: {_shown(name)} is built into the interpreter, or what it starts with, and cannot be left out"


def _syscalls(policy: Policy) -> Iterator[str]:
    if policy.syscalls is None:
        return
    from .syscalls import name_problems

    for problem in name_problems(policy.syscalls):
        yield f"$.syscalls.{problem}"


def _labels(policy: Policy) -> Iterator[str]:
    for name in ("apparmor", "selinux"):
        label = getattr(policy, name)
        if label is not None and not (0 < len(label) < 1024 and label.isprintable() and label.isascii() and " " not in label):
            yield f"$.{name}: {_shown(label)} is not a label: printable characters are, without spaces"
    if policy.apparmor is not None and policy.selinux is not None:
        yield "$.selinux: a kernel has AppArmor or SELinux, not both"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) <= 80 else text[:76] + "..."
