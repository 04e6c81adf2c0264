"""The suite runs real jails. Started by root it runs as root, and beside that once more as an unprivileged user."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import hypothesis
import pytest

import nsjail_py
from nsjail_py import cachedir, launcher

IS_ROOT = os.geteuid() == 0
ROOT = Path(__file__).parent.parent
PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))
"""How many times slower this machine is than one of our own, for tests that hold a clock against a limit. ./dev vm sets it where it emulates."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as in the background of a shell; what the tests start is to have it as from a terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ours", deadline=None)  # a shared machine is slow at any moment
hypothesis.settings.load_profile("ours")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="every fault: minutes, not seconds (./dev faults)")


class BesideUs:
    """The ordinary user's run, which takes turns with nobody: ordinary.py, with the suites that are asked for."""

    def __init__(self, suites: list[str]) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="ordinary-"))
        self.home.chmod(0o755)
        command = [sys.executable, str(Path(__file__).with_name("ordinary.py")), str(self.home), *suites]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as started:  # which goes on as another process
            assert started.stdin
            self.lifeline = os.dup(started.stdin.fileno())
            os.set_inheritable(self.lifeline, False)

    def pid(self) -> str:
        return (self.home / "pid").read_text() if (self.home / "pid").exists() else "self"

    def close(self) -> None:
        os.close(self.lifeline)


BESIDE_US = pytest.StashKey[BesideUs]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What only another user or another kind of host can show is none of this run's. What the ordinary user's run came to is looked at last."""
    others = [item for item in items if any(mark.args[0] for mark in item.iter_markers("elsewhere"))]
    config.hook.pytest_deselected(items=others)
    items[:] = sorted((item for item in items if item not in others), key=lambda item: item.path.name == "test_ordinary_user.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for item in terminalreporter.stats.get("deselected", []):
        for mark in item.iter_markers("elsewhere"):
            if mark.args[0]:
                terminalreporter.write_line(f"ELSEWHERE [1] {item.location[0]}:{item.location[1]}: {mark.kwargs['why']}")


def pytest_collection_finish(session: pytest.Session) -> None:
    if IS_ROOT and not session.config.option.collectonly:
        suites = [item.callspec.params["suite"] for item in session.items if item.path.name == "test_ordinary_user.py"]  # type: ignore[attr-defined]
        if suites:
            session.config.stash[BESIDE_US] = BesideUs(suites)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if beside_us := session.config.stash.get(BESIDE_US, None):
        beside_us.close()


@pytest.fixture
def beside_us(request: pytest.FixtureRequest) -> BesideUs:
    return request.config.stash[BESIDE_US]


@pytest.fixture(autouse=True, scope="session")
def no_stock() -> None:
    """A jail that waits for the next run would count as one left behind. test_stock.py is about those."""
    nsjail_py.jail.STOCK = 0


def _links(pid: int | str) -> Iterator[str]:
    """What a process's descriptors are; of one that we may not look into, none."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(f"/proc/{pid}/fd/{number}")


def _children(pid: int | str) -> list[str]:
    """Those of all its threads."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
    return found


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs; none of one that is gone."""
    children = list(map(int, _children(pid)))
    return children + [below for child in children for below in descendants(child)]


def _dead(pid: str) -> bool:
    """Whether nothing but an entry is left of it, which its new parent has not taken away yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _ids() -> range:
    """The host ids of this launcher's cells, which nobody else has; an ordinary user's cells have his own."""
    if not IS_ROOT:
        return range(os.geteuid(), os.geteuid() + 1)
    block = os.readlink(f"/proc/self/fd/{launcher.current().uid_lock}").rpartition("-")[2]
    first = launcher.UID_BASE + int(block) * launcher.UID_BLOCK
    return range(first, first + launcher.UID_BLOCK)


def _strangers() -> Iterator[str]:
    """Processes of the cells' ids, whatever they are children of now."""
    ids = _ids()
    for pid in os.listdir("/proc") if IS_ROOT else ():
        with contextlib.suppress(OSError):
            if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid in ids and not _dead(pid):
                yield pid


def _name(pid: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"


def _namespaces(pids: set[str]) -> set[str]:
    """Those that we are not in ourselves."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in os.listdir("/proc/self/ns")}
    return found - {os.readlink(f"/proc/self/ns/{kind}") for kind in os.listdir("/proc/self/ns")}


def _shared_memory() -> Iterator[str]:
    """System V objects, and files that stand for memory, that cells have made."""
    ids = _ids()
    for kind in ("shm", "msg", "sem"):
        titles, *lines = (line.split() for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines())
        yield from (f"{kind} {line[1]}" for line in lines if int(line[titles.index("cuid")]) in ids)
    for name in os.listdir("/dev/shm"):
        with contextlib.suppress(OSError):
            if os.stat(f"/dev/shm/{name}").st_uid in ids:
                yield name


def traces() -> dict[str, list[str]]:
    """What a run could leave behind, by kind; numbers do not count, since a test may have replaced the launcher. Left out are a plan's block,
    which stays once for each plan, and the part of the root that a plan's jails share, which its launcher keeps for ten seconds."""
    current = launcher.current()
    children = _children("self")
    cells = {*(cell for child in children for cell in _children(child)), *_strangers()}
    groups = [path for top in current.claim.directories.values() for path, _, _ in os.walk(top)]
    found: dict[str, Iterable[str]] = {
        "descriptors": (name for name in _links("self") if not name.startswith("/memfd:plan")),
        "launcher's descriptors": (name for name in _links(current.pid) if not name.startswith("mnt:")),
        "children": map(_name, children),
        "cells": map(_name, cells),
        "namespaces": _namespaces({*children, *cells}),
        "mounts": Path("/proc/self/mountinfo").read_text().splitlines(),
        "cgroups": (os.path.basename(path).partition(".")[0] for path in groups),
        "shared memory": _shared_memory(),
        "temporary files": (name for name in os.listdir(tempfile.gettempdir()) if name.startswith("nsjail")),
        "unfinished files": (path.name for kind in ("roots", "filters") for path in cachedir.directory(kind).glob(".new-*")),
    }
    # a launcher's group ends in eight random hex digits, which may all be letters
    return {what: sorted(re.sub(r"\b[0-9a-f]{8,}\b|[0-9a-f]*[0-9][0-9a-f]*", "N", name) for name in names) for what, names in found.items()}


def settled() -> dict[str, list[str]]:
    """The traces of a launcher that has had a run: it and the root in the cache stay. A run is answered when its processes are gone; the
    empty jail itself goes a little later, and the launcher lets go of its clock last."""
    nsjail_py.run(["/bin/true"])
    while (found := traces())["cells"] or "anon_inode:[timerfd]" in found["launcher's descriptors"]:
        time.sleep(0.01)
    return found


def changes(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """What there is more of, or others. Only less is no leak: a group that was busy when its jail ended goes with the next one."""
    added = {what: Counter(after[what]) - Counter(before[what]) for what in before}
    return {what: (sorted(more.elements()), after[what]) for what, more in added.items() if more}


def nothing_more(before: dict[str, list[str]], look: Callable[[], dict[str, list[str]]], seconds: float) -> None:
    """Waits so long for what is still being cleared away."""
    deadline = time.monotonic() + seconds
    while (more := changes(before, look())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not more


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """The test leaves no descriptor, process, namespace, mount, control group, shared memory or file."""
    before = settled()
    yield
    nothing_more(before, traces, 5)  # a run that the test gave up


@pytest.fixture(scope="module", autouse=True)
def every_suite_leaves_nothing() -> Iterator[None]:
    """All tests of a file together, of what is ours: others of this machine come and go meanwhile."""

    def ours() -> dict[str, list[str]]:
        found = traces()
        mounts = [line for line in found["mounts"] if ("nsjail" in line or "canary" in line) and "/nsjail_py/vm/" not in line]
        return found | {"mounts": mounts, "temporary files": []}

    settled()
    before = ours()
    yield
    nothing_more(before, ours, 15)  # what is in stock stays for ten seconds


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the host that is in no minimal root, and that everybody can go through, a runtime's root included."""
    made = Path(tempfile.mkdtemp(prefix="nsjail-place-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def in_opt() -> Iterator[Path]:
    """A directory where programs have the same path inside a minimal root."""
    if not os.access("/opt", os.W_OK):
        pytest.skip("only root writes to /opt")
    with tempfile.TemporaryDirectory(prefix="nsjail-test-", dir="/opt") as made:
        os.chmod(made, 0o755)
        yield Path(made)


@pytest.fixture(params=["trusted", "moderate", "untrusted"])
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def importing_ours() -> dict[str, str]:
    """The environment of a Python that imports from this directory, too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))}


@pytest.fixture
def cli() -> list[str]:
    return [sys.executable, "-m", "nsjail_py"]


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    """As a systemd unit has it with UMask=0077."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))
