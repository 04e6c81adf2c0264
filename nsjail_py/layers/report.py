"""The layers' report: every payload of the catalogue under each layer alone, and under a whole policy; what became of the canaries decides.

A layer stops a payload when nothing happens to the canaries, however it came to that. The layers of Python run in processes of their own,
bounded in time, memory and processor; what the payloads touch there are canaries of one run.
"""

from __future__ import annotations

import base64
import itertools
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import NamedTuple

import msgspec

from nsjail_py.errors import LauncherDied, ScriptRefused
from nsjail_py.jail import Jail
from nsjail_py.policy import Policy
from nsjail_py.policyfile import override, resolve

from . import audit, patterns
from .catalogue import GOALS, HERE, Payload, payloads
from .scan import REFUSED, before_run, scan

NONE, POLICY = "none", "policy"
TEXT = ("pattern scan", "AST scan")
WITHIN = ("import hook", "wrapped built-ins", "RestrictedPython", "audit hook", "native audit hook")
LAYERS = (*TEXT, *WITHIN)
VARIABLE = "NSJAIL_CANARY"
TIMEOUT = 15.0
WORKERS = 2
PATIENCE = 2.0
"""Seconds of processor time in a jail."""
AUDIT = {"size": audit.SIZE, "refused": "\n".join(f"{kind}={words}" for kind, (_, words) in audit.WORDS.items())}
"""What the hook of `audit = "refuse"` is told under a policy that has neither processes nor sockets."""
LINGERING = ("timer-thread", "signal-handler")
"""Payloads that act a moment later."""


class Outcome(NamedTuple):
    """One payload under one layer."""

    effects: tuple[str, ...]
    """What happened to the host: values of GOALS."""
    detail: str
    """What the layer said, or how the run ended."""
    crashed: bool = False
    """Whether the interpreter died by a signal."""

    @property
    def stopped(self) -> bool:
        return not self.effects


@dataclass
class Row:
    """One payload, with nothing in its way (NONE) and under every layer."""

    payload: Payload
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return GOALS[self.payload.goal] in self.outcomes[NONE].effects


@dataclass
class Report:
    """The whole table."""

    policy: str
    rows: list[Row]
    skipped: dict[str, str]
    """Payloads that cannot run here, with the reason."""

    @property
    def layers(self) -> list[str]:
        return [layer for layer in (*LAYERS, POLICY) if self.rows and layer in self.rows[0].outcomes]

    def score(self, layer: str) -> tuple[int, int]:
        """(stopped, of payloads that work when nothing stops them)"""
        working = [row for row in self.rows if row.works]
        return sum(row.outcomes[layer].stopped for row in working), len(working)


class Canaries:
    """What the payloads of one run are after. The tokens are drawn anew, so that whatever shows one has read it."""

    def __init__(self, top: Path, variable: str) -> None:
        self.top = top
        self.work = top / "work"
        self.tokens = {name: secrets.token_hex(12) for name in ("file", "command", "import", "end")}
        self.tokens["env"] = variable
        self.places = {
            "ENV": VARIABLE,
            "FILE": str(top / "canary.txt"),
            "WRITE": str(top / "written.txt"),
            "RUN": str(top / "canary.sh"),
            "MODULE": "nsjail_canary",
            "DIR": str(top / "lib"),
        }
        top.chmod(0o755)
        self.work.mkdir()
        (top / "canary.txt").write_text(self.tokens["file"])
        (top / "written.txt").write_text("as it was")
        (top / "canary.sh").write_text(f"#!/bin/sh\necho {self.tokens['command']}\necho ran >>{top}/ran\n")
        (top / "canary.sh").chmod(0o755)
        (top / "lib").mkdir()
        (top / "lib" / "nsjail_canary.py").write_text(f"print({self.tokens['import']!r}, flush=True)\n")

    def effects(self, output: bytes) -> Iterator[str]:
        """What happened, by the tokens in the output and by what was changed."""
        text = output.decode("utf-8", "replace")
        for goal in ("env", "file", "import"):
            if self.tokens[goal] in text:
                yield GOALS[goal]
        if self.tokens["command"] in text or (self.top / "ran").exists():
            yield GOALS["command"]
        written = [path for path in self.top.iterdir() if path.name.startswith("written.txt")]
        if len(written) != 1 or written[0].read_bytes() != b"as it was":
            yield GOALS["write"]

    def survived(self, output: bytes) -> bool:
        return f"SURVIVED {self.tokens['end']}".encode() in output

    def job(self, payload: Payload, layer: str, patience: float, *, bounded: bool) -> bytes:
        return msgspec.json.encode(
            {
                "layer": layer,
                "payload": base64.b64encode(payload.source(self.places)).decode(),
                "directory": str(self.work),
                "bounded": bounded,
                "path": [str(HERE.parent), self.places["DIR"]] if bounded else [],
                "processor": math.ceil(patience * (1 if payload.family == "exhaustion" else 8)),
                "linger": 0.3 * patience if payload.name in LINGERING else 0,
                "audit": AUDIT if layer == "native audit hook" else {},
                "end": self.tokens["end"],
            }
        )


@contextmanager
def canaries(variable: str = "") -> Iterator[Canaries]:
    """Under /var/tmp, which no jail makes its own: what is hidden from a payload is hidden by the policy."""
    top = Path(tempfile.mkdtemp(prefix="nsjail-canary-", dir="/var/tmp" if os.access("/var/tmp", os.W_OK) else None))
    try:
        yield Canaries(top, variable or secrets.token_hex(12))
    finally:
        shutil.rmtree(top, ignore_errors=True)


# ---------------------------------------------------------------- one payload


def within(payload: Payload, layer: str, patience: float = 1.0) -> Outcome:
    """A layer of Python, or none, in a process of its own."""
    with canaries() as made:
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",
            "TMPDIR": str(made.work),
            VARIABLE: made.tokens["env"],
        }
        with subprocess.Popen(
            [sys.executable, "-s", "-P", str(HERE / "application.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=made.work,
            env=environment,
            start_new_session=True,
        ) as process:
            late = ""
            try:
                output, _ = process.communicate(made.job(payload, layer, patience, bounded=True), TIMEOUT * patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                late = f"still running after {TIMEOUT * patience:g} s"
        return _outcome(made, output, process.returncode, late)


def jailed(payload: Payload, policy: Policy, jail: Jail, patience: float = 1.0) -> Outcome:
    """A whole policy: its scan of the payload, then its jail. Ending the program inside ends no application: that is outside."""
    source = (HERE / "application.py").read_bytes()
    with canaries(os.environ.get(VARIABLE, "")) as made:
        try:
            if policy.python.scan == "refuse":
                before_run(policy, payload.source(made.places), "payload.py")
            result = jail.run_python(source, input=made.job(payload, NONE, patience, bounded=False), filename="application.py")
        except ScriptRefused as refused:
            return Outcome(tuple(made.effects(b"")), str(refused))
        except LauncherDied as error:
            return Outcome((*made.effects(b""), "ended the launcher"), str(error))
        output = result.stdout + result.stderr
        denied = f"; denied: {', '.join(result.denied)}" if result.denied else ""
        ended = _said(output) or result.summary
        return Outcome(tuple(made.effects(output)), f"{ended}{denied}", result.signal is not None)


def _outcome(made: Canaries, output: bytes, status: int, late: str) -> Outcome:
    effects = [*made.effects(output)]
    crashed = status < 0 and not late
    if not made.survived(output):
        effects.append(GOALS["crash"])
    how = late or (f"ended by {signal.Signals(-status).name}" if crashed else "")
    return Outcome(tuple(effects), how or _said(output), crashed)


def _said(output: bytes) -> str:
    for line in output.decode("utf-8", "replace").splitlines():
        if line.startswith("REFUSED "):
            return line.removeprefix("REFUSED ")
    return ""


def by_text(payload: Payload, unhindered: Outcome) -> dict[str, Outcome]:
    """The layers that only read: what they let through does what it does."""
    with canaries() as made:
        source = payload.source(made.places)
    hits = patterns.matches(source)
    try:
        found = [one for one in scan(source) if one.severity in REFUSED]
        rules = ", ".join(dict.fromkeys(one.rule for one in found))
    except SyntaxError as error:
        rules = f"SyntaxError: {error.msg}"
    return {
        "pattern scan": Outcome((), f"matched {hits[0]!r}") if hits else unhindered._replace(detail="matched nothing"),
        "AST scan": Outcome((), rules) if rules else unhindered._replace(detail="found nothing"),
    }


# ---------------------------------------------------------------- all of them


def missing(payload: Payload) -> str:
    """Why it cannot be run here; empty when it can."""
    if payload.needs == "x86_64":
        return "" if platform.machine() == "x86_64" else "its machine code is for x86_64"
    return "" if not payload.needs or util.find_spec(payload.needs) else f"{payload.needs} is not installed"


def report(
    policy: Policy | str | os.PathLike[str] = "untrusted",
    *,
    only: Iterable[Payload] | None = None,
    layers: Iterable[str] = (*LAYERS, POLICY),
    patience: float = 1.0,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Report:
    """Runs the payloads (`only` some of them) under the layers. Raises PolicyError, and SetupError where the policy cannot be run here.

    patience: how many times as long as usual each may take, on a slow machine; never longer than the policy lets it.
    """
    loaded = resolve(policy)
    chosen = list(payloads() if only is None else only)
    skipped = {payload.name: reason for payload in chosen if (reason := missing(payload))}
    run = [payload for payload in chosen if payload.name not in skipped]
    wanted = [layer for layer in (*LAYERS, POLICY) if layer in set(layers)]
    if util.find_spec("RestrictedPython") is None and "RestrictedPython" in wanted:
        wanted.remove("RestrictedPython")
    # Endless payloads end earlier than the policy has it; the application, which is ours, is not scanned.
    most = {"cpu_time": PATIENCE * patience, "wall_time": TIMEOUT * patience}
    times = {name: min(getattr(loaded.limits, name) or seconds, seconds) for name, seconds in most.items()}
    brief = override(loaded, scan="off", **times)
    jails = {need: Jail(override(brief, imports=(*loaded.python.imports, need)) if need else brief) for need in _distributions(run)}
    done = itertools.count(1)

    def one(payload: Payload) -> Row:
        row = Row(payload, {NONE: within(payload, NONE, patience)})
        texts = by_text(payload, row.outcomes[NONE])
        for layer in wanted:
            if layer in TEXT:
                row.outcomes[layer] = texts[layer]
            elif layer == POLICY:
                row.outcomes[layer] = jailed(payload, loaded, jails[payload.needs if payload.needs != "x86_64" else ""], patience)
            else:
                row.outcomes[layer] = within(payload, layer, patience)
        progress(next(done), len(run))
        return row

    with secret_variable(), ThreadPoolExecutor(WORKERS) as pool:
        rows = list(pool.map(one, run))
    return Report(loaded.name, rows, skipped)


@contextmanager
def secret_variable() -> Iterator[None]:
    """A secret in this process's own environment, which the jails' caller has and the jails must not."""
    os.environ[VARIABLE] = secrets.token_hex(12)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def _distributions(run: Iterable[Payload]) -> set[str]:
    return {"", *(payload.needs for payload in run if payload.needs != "x86_64")}
