"""A jail that was lost before its program ran is made again: what waits in stock, or is a warm interpreter, may have been killed."""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNRESET, EPIPE, ESRCH
from typing import TYPE_CHECKING, TypeVar

from . import launcher
from .errors import SetupError

if TYPE_CHECKING:
    from .process import Process
    from .result import Result

T = TypeVar("T")
TRIES = 3
"""As many as are in stock by default, and one."""
GONE = (EPIPE, ECONNRESET)
KILLED = {("lost", 0), ("template", ESRCH), *((step, gone) for step in ("order", "template") for gone in GONE)}
"""Steps and errnos of a jail, or a warm interpreter, that was there and is gone."""


def to_end(start: Callable[[], Process], input: bytes | None = None, timeout: float | None = None) -> Result:
    def once() -> Result:
        with start() as process:
            return process.communicate(input, timeout)

    return until_it_begins(once)


def until_it_begins(attempt: Callable[[], T]) -> T:
    for _ in range(TRIES - 1):
        used = launcher.peek()
        try:
            return attempt()
        except SetupError as error:
            if not worth_another(error, used):
                raise
    return attempt()


def worth_another(error: SetupError, used: launcher.Launcher | None) -> bool:
    """Whether another jail may be had: nothing has run, and this one was killed, or the groups of its launcher are gone, and that with
    them."""
    if error.began:
        return False
    return launcher.peek() is not used if error.step == "cgroup" else (error.step, error.errno) in KILLED
