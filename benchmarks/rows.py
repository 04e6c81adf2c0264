"""What is measured, and what it is held against: a row has its samples, a target its bound. Medians count, and ratios of one run."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import msgspec

from nsjail_py import Result


class Row(msgspec.Struct):
    """The samples of one thing that was measured."""

    part: str
    name: str
    samples: list[float]
    unit: str
    protections: str
    """What really stood between the program and the host."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        return sorted(self.samples)[min(len(self.samples) - 1, int(len(self.samples) * 0.99))]


def protections(result: Result) -> str:
    """Those that a run really had, as its result tells."""
    applied = [one.name for one in result.protections if one.state == "applied"]
    return f"{len(applied)}: {', '.join(applied)}"


class Target(NamedTuple):
    """A bound for a row: of its median itself, or of its ratio to another row's."""

    row: str
    bound: float
    kind: str
    """`most` or `least` of the row's own value, `p99` at most; `times` the other at most; `faster` than the other so many times at least."""
    other: str = ""

    def value(self, rows: dict[str, Row]) -> float | None:
        """What is held against the bound; None where one of the rows was not measured."""
        if self.row not in rows or (self.other and self.other not in rows):
            return None
        own = rows[self.row]
        if not self.other:
            return own.p99 if self.kind == "p99" else own.median
        ratio = own.median / rows[self.other].median
        return 1 / ratio if self.kind == "faster" else ratio

    def met(self, value: float) -> bool:
        return value >= self.bound if self.kind in ("least", "faster") else value <= self.bound

    def text(self, rows: dict[str, Row]) -> str:
        value = self.value(rows)
        if value is None:
            return ""
        than = {"most": "at most", "least": "at least", "p99": "p99 at most", "times": "at most", "faster": "at least"}[self.kind]
        unit = f" x {self.other}" if self.kind == "times" else f" x faster than {self.other}" if self.other else f" {rows[self.row].unit}"
        return f"{'met' if self.met(value) else 'MISSED'}: {than} {self.bound:g}{unit}, is {value:.2f}"


def table(rows: list[Row], targets: tuple[Target, ...]) -> str:
    """All rows by part, each with the targets that are about it."""
    named = {row.name: row for row in rows}
    lines = []
    for part in dict.fromkeys(row.part for row in rows):
        lines += ["", part, f"  {'':52}{'median':>10}{'p99':>10}"]
        for row in rows:
            if row.part == part:
                lines.append(f"  {row.name:52}{row.median:10.2f}{row.p99:10.2f} {row.unit}")
                lines += [f"      {text}" for one in targets if one.row == row.name and (text := one.text(named))]
    lines += ["", "what stood between the program and the host"]
    for text in dict.fromkeys(row.protections for row in rows):
        lines += ["  " + "; ".join(row.name for row in rows if row.protections == text), f"      {text}"]
    return "\n".join(lines)


def record(rows: list[Row], targets: tuple[Target, ...], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything, ready for JSON."""
    named = {row.name: row for row in rows}
    return {
        "machine": machine,
        "rows": [
            {
                "part": row.part,
                "name": row.name,
                "unit": row.unit,
                "median": row.median,
                "p99": row.p99,
                "samples": len(row.samples),
                "protections": row.protections,
            }
            for row in rows
        ],
        "targets": [{**one._asdict(), "value": value, "met": one.met(value)} for one in targets if (value := one.value(named)) is not None],
    }
