"""The suite runs real jails. Started by root it runs as root, and test_ordinary_user.py runs it once more as an unprivileged user."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

import nsjail_py
from nsjail_py import launcher

IS_ROOT = os.geteuid() == 0
ROOT = Path(__file__).parent.parent
PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))
"""How many times slower this machine is than one of our own, for tests that hold a clock against a limit. ./dev vm sets it where it emulates."""

hypothesis.settings.register_profile("patient", deadline=None)
if PATIENCE > 1:
    hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="every fault and thousands of kills: minutes, not seconds (./dev faults)")


@pytest.fixture(autouse=True, scope="session")
def no_stock() -> None:
    """A jail that waits for the next run would count as one left behind. test_stock.py is about those."""
    nsjail_py.jail.STOCK = 0


def _descriptors() -> Iterator[str]:
    """What our descriptors are. A plan's block stays, once for each plan."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{number}")


def traces() -> dict[str, int]:
    """What a run could leave behind, counted."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    below = [Path(f"/proc/{child}/task/{child}/children").read_text().split() for child in children if Path(f"/proc/{child}").exists()]
    groups = [path for top in launcher.current().claim.directories.values() for path, _, _ in os.walk(top)]
    return {
        "descriptors": len([name for name in _descriptors() if not name.startswith("/memfd:plan")]),
        "children": len(children),
        "cells": sum(map(len, below)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": len(groups),
        "temporary files": len([name for name in os.listdir(tempfile.gettempdir()) if "nsjail" in name]),
    }


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """The test leaves no descriptor, process, mount, control group or temporary file."""
    nsjail_py.run(["/bin/true"])  # the launcher itself, and the root in the cache, stay
    while (before := traces())["cells"]:  # it is answered when its processes are gone; the empty jail itself goes a little later
        time.sleep(0.01)
    yield
    deadline = time.monotonic() + 5  # a run that the test gave up is still being cleared away
    while (more := _more(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not more, f"{more} more than {before}"


def _more(before: dict[str, int]) -> dict[str, int]:
    """What there is more of now. Less is no leak: a group that was busy when its jail ended goes with the next one."""
    return {name: count - before[name] for name, count in traces().items() if count > before[name]}


@pytest.fixture(params=["trusted", "moderate", "untrusted"])
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cli() -> list[str]:
    return [sys.executable, "-m", "nsjail_py"]
