"""Near spellings, for errors about unknown names."""

from __future__ import annotations

from collections.abc import Iterable

LISTED = 12


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What follows an error about an unknown name: ` (allowed: ...; did you mean "x"?)`. A long list is not repeated."""
    from difflib import get_close_matches

    names = sorted(set(known))
    near = get_close_matches(str(name), names, n=1, cutoff=0.6)
    parts = [f"allowed: {', '.join(names)}"] if 0 < len(names) <= LISTED else []
    parts += [f'did you mean "{near[0]}"?'] if near else []
    if len(names) > LISTED and not near:
        parts = [f"allowed: {', '.join(names[:LISTED])} and {len(names) - LISTED} more"]
    return f" ({'; '.join(parts)})" if parts else ""
