"""The pattern scan, as applications have it: regular expressions over the text. Here to be compared with the others; scan.py is better."""

from __future__ import annotations

import re

PATTERNS = (
    r"\bimport\s+(os|sys|subprocess|shutil|socket|ctypes|importlib|builtins|pickle|marshal|pty|multiprocessing|signal|gc|inspect|code)\b",
    r"\bfrom\s+(os|sys|subprocess|shutil|socket|ctypes|importlib|builtins|pickle|marshal|pty|multiprocessing|signal|gc|inspect|code)\b",
    r"\b(eval|exec|compile|open|__import__|globals|locals|vars|getattr|setattr|delattr|input|breakpoint)\s*\(",
    r"\bos\.(system|popen|spawn\w*|exec\w*|fork|remove|unlink|environ|getenv)\b",
    r"\bsubprocess\b",
    r"__(class|bases?|mro|subclasses|globals|builtins|code|dict|getattribute|loader|import|reduce\w*)__",
    r"/etc/|/proc/|\.\./",
)


def matches(source: bytes) -> list[str]:
    """What of the text looks forbidden."""
    text = source.decode("utf-8", "replace")
    return [match[0] for pattern in PATTERNS if (match := re.search(pattern, text))]
