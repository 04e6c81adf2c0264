"""Near spellings, for errors about unknown names."""

from __future__ import annotations

from collections.abc import Iterable

LISTED = 12


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What follows an error about an unknown name: ` (allowed: ...; did you mean "x"?)`. A long list is not repeated."""
    from difflib import SequenceMatcher, get_close_matches

    def likeness(one: str) -> tuple[float, bool]:
        """Of two that are equally close the one that begins the same: "cgroups" is "cgroup" rather than "groups"."""
        return SequenceMatcher(None, one, str(name)).ratio(), one[:1] == str(name)[:1]

    names = sorted(set(known))
    near = max(get_close_matches(str(name), names), key=likeness, default="")
    parts = [f"allowed: {', '.join(names)}"] if 0 < len(names) <= LISTED else []
    parts += [f'did you mean "{near}"?'] if near else []
    if len(names) > LISTED and not near:
        parts = [f"allowed: {', '.join(names[:LISTED])} and {len(names) - LISTED} more"]
    return f" ({'; '.join(parts)})" if parts else ""
