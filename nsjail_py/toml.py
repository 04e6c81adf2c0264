"""TOML for all that is written here for others to use: what stands in it was named by scripts, profiles and files that nobody trusts.
toml.io/en/v1.0.0"""

from __future__ import annotations

import json
from collections.abc import Iterable

from .errors import PolicyError
from .oneline import one_line


def string(value: str) -> str:
    """A string of one line. Raises PolicyError for what no policy can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PolicyError(f"{value!r} is not valid Unicode (a file name that is not UTF-8?), and a policy cannot hold it") from None
    # JSON's pairs of surrogates are none of TOML's escapes, and TOML wants DEL escaped, too.
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in json.dumps(value, ensure_ascii=False))


def array(values: Iterable[str]) -> str:
    """A list of strings, in one line."""
    return f"[{', '.join(map(string, values))}]"


def comment(value: str, most: int = 1000) -> str:
    """What may follow a `#`: one line, whatever is in it, and safe to print."""
    plain = one_line(value)
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."
