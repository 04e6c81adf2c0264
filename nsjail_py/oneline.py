"""Text of others, as it may be printed: names and paths in a script, a policy or a report are whatever their author wants."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text without a line end, or any other character that does something to a terminal: those are written as Python writes them."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
