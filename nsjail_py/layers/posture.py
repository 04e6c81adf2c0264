"""The posture of a policy on this host, as `systemd-analyze security` has it for units: for which code it is fit, a row for each exposure,
what is left, and what to change for the next level. exposures.py has the rows."""

from __future__ import annotations

import functools
import os
import textwrap
from html import escape
from typing import Any, Literal, NamedTuple, get_args

from msgspec import Struct, structs

from nsjail_py import compiled, launcher, syscalls
from nsjail_py.oneline import one_line
from nsjail_py.policy import Policy
from nsjail_py.policyfile import resolve
from nsjail_py.result import Protection

from .exposures import EXPOSURES, HOLES, Exposure, Facts

Level = Literal["trusted", "moderately trusted", "untrusted"]
LEVELS: tuple[Level, ...] = get_args(Level)
MEANING: dict[Level, str] = {
    "trusted": "only for code that you trust: a seat belt",
    "moderately trusted": "for code that you did not write and have no reason to fear",
    "untrusted": "for code that may be hostile",
}
WIDTH = 130


class Row(NamedTuple):
    """One exposure under this policy, on this host."""

    name: str
    weight: int
    badness: float
    """0: closed; 1: open."""
    state: Literal["closed", "narrowed", "open"]
    enforced: str
    residual: str
    change: str
    hole: int


class Hole(NamedTuple):
    """One of the four holes that the project began with."""

    name: str
    state: Literal["closed", "narrowed", "open"]
    layers: tuple[str, ...]
    """What closes it."""
    left: tuple[str, ...]


class Posture(Struct, frozen=True):
    """What a policy comes to on this host."""

    policy: str
    mode: str
    """`root`, `delegated` or `rootless`."""
    level: Level
    """The least trusted code that it is fit for."""
    exposure: float
    """0 to 10: the weighted sum of what is left; small is good."""
    rows: tuple[Row, ...]
    holes: tuple[Hole, ...]
    next_level: Level | None
    changes: tuple[str, ...]
    """What to change for the next level."""
    refused: tuple[str, ...]
    """Protections that the policy requires and this host lacks: every run under it is an error here."""


def posture(policy: Policy | str | os.PathLike[str] = "untrusted") -> Posture:
    """Judges a policy. Raises PolicyError."""
    settled = resolve(policy)
    facts, mode, refused = _facts(settled)
    rows = tuple(_row(one, facts) for one in EXPOSURES)
    level = _level(rows)
    above = LEVELS[LEVELS.index(level) + 1] if level != LEVELS[-1] else None
    changes = () if above is None else tuple(f"{row.name}: {row.change}" for row in _failing(rows, above))
    total = sum(row.weight for row in rows)
    exposure = round(10 * sum(row.weight * row.badness for row in rows) / total, 1)
    return Posture(settled.name, mode, level, exposure, rows, _holes(rows), above, changes, refused)


@functools.lru_cache(maxsize=64)
def of_policy(policy: Policy) -> Posture:
    """The same, judged once: for results, which refer to it."""
    return posture(policy)


def _facts(policy: Policy) -> tuple[Facts, str, tuple[str, ...]]:
    """What the host gives, without failing where it gives too little."""
    claim = launcher.current().claim
    host = compiled.Host.of(claim)
    found = compiled.protections(policy, host, judged=True)
    if policy.landlock and not host.landlock_abi:
        lack = Protection("landlock_fs", "unavailable", "this kernel has no Landlock")
        found = tuple(lack if one.name == lack.name else one for one in found)
    missing = [one for one in found if one.state == "unavailable" and one.name not in policy.best_effort]
    refused = tuple(f"{one.name}: {one.reason}" for one in missing)
    if policy.backend != "native":
        from nsjail_py.oci_backend import lacks, told

        found, refused = told(policy, found), refused + lacks(policy)
    states: dict[str, str] = {one.name: one.state for one in found}
    reasons = {one.name: one.reason for one in found if one.reason}
    calls = None if policy.syscalls is None else frozenset(syscalls.calls_of(policy.syscalls))
    return Facts(policy, states, reasons, calls), claim.mode, refused


def _row(one: Exposure, facts: Facts) -> Row:
    said = one.judge(facts)
    return Row(one.name, one.weight, said.badness, _state(said.badness), said.enforced, said.residual, said.change, one.hole)


def _state(badness: float) -> Literal["closed", "narrowed", "open"]:
    return "closed" if badness == 0 else "open" if badness >= 1 else "narrowed"


def _failing(rows: tuple[Row, ...], level: Level) -> list[Row]:
    """The rows that are too bad for a level."""
    most = {one.name: {"trusted": 1.0, "moderately trusted": one.moderate, "untrusted": one.untrusted}[level] for one in EXPOSURES}
    return [row for row in rows if row.badness > most[row.name]]


def _level(rows: tuple[Row, ...]) -> Level:
    return next((level for level in reversed(LEVELS) if not _failing(rows, level)), "trusted")


def _holes(rows: tuple[Row, ...]) -> tuple[Hole, ...]:
    found = []
    for number, name in HOLES.items():
        mine = [row for row in rows if row.hole == number]
        layers = tuple(f"{row.name}: {row.enforced}" for row in mine if row.enforced)
        left = tuple(f"{row.name}: {row.residual}" for row in mine if row.badness)
        found.append(Hole(name, _state(max(row.badness for row in mine)), layers, left))
    return tuple(found)


# ---------------------------------------------------------------- how it is told


def text(found: Posture) -> str:
    """For a person at a terminal."""
    lines = [f"policy {found.policy}, mode {found.mode}: {found.level} ({MEANING[found.level]}); exposure {found.exposure:.1f} of 10", ""]
    lines += [f"  REFUSED here: {one}" for one in found.refused]
    lines += [f"  {'':8} {'weight':>6}  exposure"]
    for row in found.rows:
        lines.append(f"  {row.state:8} {row.weight or '-':>6}  {row.name}")
        lines += _wrapped("by", row.enforced) + _wrapped("left", row.residual) + (_wrapped("more", row.change) if row.badness else [])
    lines += ["", "the four holes"]
    for hole in found.holes:
        lines.append(f"  {hole.state:8} {hole.name}")
        lines += [line for layer in hole.layers for line in _wrapped("by", layer)]
        lines += [line for one in hole.left for line in _wrapped("left", one)]
    if found.next_level:
        lines += ["", f"for the next level, {found.next_level} ({MEANING[found.next_level]}), change:"]
        lines += [f"  - {one}" for one in found.changes]
    return "\n".join(map(one_line, lines))


def _wrapped(word: str, said: str) -> list[str]:
    head = f"{'':19}{word + ':':6}"
    more = " " * len(head)
    return textwrap.wrap(said, WIDTH, initial_indent=head, subsequent_indent=more, break_long_words=False, break_on_hyphens=False)


def html(found: Posture) -> str:
    """The same as a page."""
    from .tables import page

    colour = {"closed": "good", "narrowed": "middle", "open": "bad"}
    about = f"Exposure {found.exposure:.1f} of 10; mode {escape(found.mode)}"
    body = [f"<p><b>{escape(found.level)}</b>: {escape(MEANING[found.level])}. {about}.</p>"]
    body += [f"<p class=bad>Refused on this host: {escape(one)}</p>" for one in found.refused]
    heads = "".join(f"<th>{name}</th>" for name in ("exposure", "weight", "state", "enforced by", "left", "to close it"))
    body.append(f"<table><thead><tr>{heads}</tr></thead>")
    for row in found.rows:
        change = escape(row.change) if row.badness else ""
        cells = f"<td><b>{escape(row.name)}</b></td><td>{row.weight or ''}</td><td class={colour[row.state]}>{row.state}</td>"
        body.append(f"<tr>{cells}<td>{escape(row.enforced)}</td><td>{escape(row.residual)}</td><td>{change}</td></tr>")
    body.append("</table><h2>The four holes</h2><table>")
    for hole in found.holes:
        cells = f"<td><b>{escape(hole.name)}</b></td><td class={colour[hole.state]}>{hole.state}</td>"
        body.append(f"<tr>{cells}<td>{'<br>'.join(map(escape, hole.layers))}</td><td>{'<br>'.join(map(escape, hole.left))}</td></tr>")
    body.append("</table>")
    if found.next_level:
        items = "".join(f"<li>{escape(one)}</li>" for one in found.changes)
        body.append(f"<h2>For the next level: {escape(found.next_level)}</h2><ul>{items}</ul>")
    return page(f"Posture of policy {found.policy}", body)


def to_dict(found: Posture) -> dict[str, Any]:
    """Everything, ready for JSON."""
    record = structs.asdict(found)
    record["rows"] = [row._asdict() for row in found.rows]
    record["holes"] = [hole._asdict() for hole in found.holes]
    return record
