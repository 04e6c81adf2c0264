"""The bypass catalogue: small payloads of our own, each with one idea of how to get past a layer at the level of Python.

Each file NAME.toml is a family; each payload has a goal that it reaches when nothing stops it, on canaries that are made for it:

    env      print the variable @ENV@           command  run the program @RUN@
    file     print the file @FILE@              import   execute the module @MODULE@ (in @DIR@)
    write    change or make the file @WRITE@*   crash    end the process that runs it

They touch nothing but these canaries. `app` is an object that the attacked application (application.py) hands over.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from nsjail_py.prepared import prepared

Goal = Literal["env", "file", "write", "command", "import", "crash"]
GOALS: dict[Goal, str] = {
    "env": "read the variable",
    "file": "read the file",
    "write": "changed a file",
    "command": "ran a program",
    "import": "imported the module",
    "crash": "ended the application",
}
"""Goal -> what happened to the host when it was reached."""
HERE = Path(__file__).parent


@prepared
class Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way past a layer."""

    name: str
    idea: str
    goal: Goal
    code: str
    needs: str = ""
    """A distribution that must be installed, or the machine (`x86_64`)."""
    family: str = ""

    def source(self, canaries: dict[str, str]) -> bytes:
        """The script, with the canaries' places in it."""
        code = self.code
        for name, place in canaries.items():
            code = code.replace(f"@{name}@", place)
        # One payload cuts a placeholder in two, and one fills a name of the same length.
        half = len(canaries["MODULE"]) // 2
        code = code.replace('@MOD" "ULE@', f'{canaries["MODULE"][:half]}" "{canaries["MODULE"][half:]}')
        return code.replace("@FILX@", "x" * len(canaries["FILE"])).lstrip("\n").encode()


@functools.cache
def payloads() -> tuple[Payload, ...]:
    """All of them, family by family."""
    return tuple(
        msgspec.structs.replace(payload, family=path.stem)
        for path in sorted(HERE.glob("*.toml"))
        for payload in msgspec.convert(tomllib.loads(path.read_text())["payload"], list[Payload])
    )
