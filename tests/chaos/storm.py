"""Kills and stops everything that takes part in a run, at random moments, while runs go on: ./dev chaos, and for a moment the suite.

    python -m chaos.storm SECONDS [SEED]

Each strike hits one process of the caller's tree, found anew, through a pidfd that is checked once more: never anything else on this
machine. Ends with 1 where a run came to anything but its own output, its own death or an error of ours, or where something is left.
"""

from __future__ import annotations

import contextlib
import glob
import os
import random
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import prctl

HERE = Path(__file__).parent
STRIKES = {"payload": 25, "job": 15, "parked": 20, "init": 15, "reaper": 10, "young": 10, "template": 3, "launcher": 2, "caller": 2}
"""What is hit, and how often of a hundred times or so. `young` is a process that is still on the ladder."""
KINDS = ("kill", "kill", "stop, kill", "stop, continue")
LIFE = 4
"""A caller is hit only when each before it has had so many seconds."""
PATIENCE = 90.0


class Target(NamedTuple):
    """A process and the one that it is a child of."""

    pid: int
    parent: int


def children(pid: int) -> list[Target]:
    """Of any thread of its: the launcher is the child of whoever needed it first."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += [Target(int(word), pid) for word in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()]
    return found


def read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""


def targets(caller: int) -> dict[str, list[Target]]:
    """Everything below the caller, by what it is."""
    found: dict[str, list[Target]] = {kind: [] for kind in STRIKES}
    found["caller"] = [Target(caller, os.getpid())]
    found["launcher"] = [child for child in children(caller) if read(child.pid, "comm") == "nsjail-launcher\n"]
    for launcher in found["launcher"]:
        for init in children(launcher.pid):
            programs = children(init.pid)
            found["init" if programs else "young"].append(init)
            for program in programs:
                _program(program, found)
    return found


def _program(program: Target, found: dict[str, list[Target]]) -> None:
    if read(program.pid, "comm") == "nsjail-launcher\n":
        found["parked" if "\nSeccomp:\t2" in read(program.pid, "status") else "young"].append(program)
    elif "/app/template.py" not in read(program.pid, "cmdline"):
        found["payload"].append(program)
    else:
        found["template"].append(program)
        for reaper in children(program.pid):
            found["reaper" if read(reaper.pid, "comm") == "nsjail-init\n" else "young"].append(reaper)
            found["job"] += children(reaper.pid)


def parent(pid: int) -> int:
    fields = read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


class Struck(NamedTuple):
    """A process that is held by its descriptor."""

    pidfd: int

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


def strike(target: Target, kind: str, chance: random.Random) -> bool:
    """Whether it was still there, and was hit."""
    try:
        held = Struck(os.pidfd_open(target.pid))
    except OSError:
        return False
    try:
        if parent(target.pid) != target.parent:
            return False
        if kind == "kill":
            held.send(signal.SIGKILL)
            return True
        held.send(signal.SIGSTOP)
        time.sleep(chance.choice((0.0, 0.001, 0.003, 0.01, 0.1)))
        held.send(signal.SIGKILL if kind == "stop, kill" else signal.SIGCONT)
        return True
    finally:
        os.close(held.pidfd)


class Storm:
    """One caller after the other, struck for so many seconds."""

    def __init__(self, seed: int, cache: str, quiet: bool) -> None:
        self.seed, self.cache, self.quiet = seed, cache, quiet
        self.chance = random.Random(seed)
        self.struck: Counter[tuple[str, str]] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.pids: list[int] = []
        self.rest = b""
        self.callers = 1

    def run(self, source: str) -> None:
        """One run, without strikes: fills the cache at first, and sweeps up at last."""
        environment = {**os.environ, "NSJAIL_PY_CACHE": self.cache}
        command = [sys.executable, "-c", f"import nsjail_py; print(nsjail_py.{source}.stdout.decode())"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.stdout.split() != ["42"]:
            self.wrong.append(f"WRONG {source} wrote {done.stdout!r}, {done.stderr!r}")

    def start(self) -> None:
        environment = {**os.environ, "NSJAIL_PY_CACHE": self.cache}
        command = [sys.executable, str(HERE / "caller.py"), str(self.seed + len(self.pids))]
        self.caller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.pids.append(self.caller.pid)
        self.started = time.monotonic()
        self.running = False

    def listen(self, seconds: float) -> bool:
        """What the caller has said meanwhile; false when it will say no more."""
        assert self.caller.stdout
        deadline = time.monotonic() + seconds
        while select.select([self.caller.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = os.read(self.caller.stdout.fileno(), 1 << 16)
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self.note(line.decode())
            if not data:
                self.rest = b""
                return False
        return True

    def note(self, line: str) -> None:
        self.running |= line == "started"
        self.outcomes[line if "WRONG" not in line else "WRONG"] += 1
        if "WRONG" in line:
            self.wrong.append(line)

    def blow(self, seconds: float) -> None:
        """Strikes until the time is over."""
        for source in ("run(['/bin/echo', '42'])", "run(['/bin/cat'], input=b'42')", "run_python('print(42)')"):
            self.run(source)
        end = time.monotonic() + seconds
        shown = time.monotonic()
        self.start()
        while (now := time.monotonic()) < end:
            self.callers = 1 + int(seconds - (end - now)) // LIFE
            if not self.listen(self.chance.expovariate(100)):
                self.replace()
            elif self.running:
                self.hit()
            elif time.monotonic() - self.started > PATIENCE:
                self.wrong.append("WRONG a caller does not start")
                return
            self.bury()
            if not self.quiet and time.monotonic() - shown > 1:
                shown = time.monotonic()
                print(f"\r{end - shown:4.0f} s  {self.line()}", end="", flush=True)
        self.finish()

    def hit(self) -> None:
        found = targets(self.caller.pid)
        present = [what for what in STRIKES if found[what] and (what != "caller" or len(self.pids) < self.callers)]
        for what in self.chance.choices(present, [STRIKES[one] for one in present], k=3) if present else ():
            kind = self.chance.choice(KINDS)
            if strike(self.chance.choice(found[what]), kind, self.chance):
                self.struck[what, kind] += 1

    def replace(self) -> None:
        """The caller is dead, so everything that it had will be; then there is another."""
        code = self.caller.wait()
        if code != -signal.SIGKILL:
            self.wrong.append(f"WRONG the caller ended with {code}")
        assert self.caller.stdin and self.caller.stdout
        self.caller.stdin.close()
        self.caller.stdout.close()
        self.deserted("after the caller's death")
        self.start()

    def bury(self) -> None:
        """Orphans come to us, who are a child subreaper."""
        for child in children(os.getpid()):
            if child.pid != self.caller.pid:
                os.waitpid(child.pid, os.WNOHANG)

    def deserted(self, when: str) -> None:
        """No orphan may stay."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            self.bury()
            if not children(os.getpid()):
                return
            time.sleep(0.002)
        left = [(child.pid, read(child.pid, "comm").strip(), read(child.pid, "stat").split()[2:3]) for child in children(os.getpid())]
        self.wrong.append(f"WRONG processes are left {when}: {left}")

    def finish(self) -> None:
        """The last caller tells whether a next run works and what is left; one more sweeps up after those that were killed."""
        if not self.listen(0.1):  # struck at the last moment
            self.replace()
        while not self.running and self.listen(0.1) and time.monotonic() - self.started < PATIENCE:
            pass
        assert self.caller.stdin
        self.caller.stdin.close()
        deadline = time.monotonic() + PATIENCE
        while self.listen(0.1) and time.monotonic() < deadline:
            pass
        if self.caller.poll() is None and time.monotonic() >= deadline:
            self.wrong.append("WRONG the caller does not end")
            self.caller.kill()
        if self.caller.wait() or not self.outcomes["left nothing"]:
            self.wrong.append(f"WRONG the caller ended with {self.caller.returncode}")
        self.deserted("at the end")
        self.run("run(['/bin/echo', '42'])")
        groups = [path for pid in self.pids for path in glob.glob(f"/sys/fs/cgroup/**/nsjail_py.{pid}.*", recursive=True)]
        files = glob.glob(f"{self.cache}/*/.new-*")
        if groups or files:
            self.wrong.append(f"WRONG left behind: {groups + files}")

    def line(self) -> str:
        ends = Counter[str]()
        for said, count in self.outcomes.items():
            ends[said.partition(" ")[2].partition(":")[0]] += count if said.split()[0] in ("cold", "stock", "warm") else 0
        return (
            f"{sum(self.struck.values())} strikes, {sum(ends.values())} runs: {ends['ok']} right, {ends['killed'] + ends['wall_time']} "
            f"ended, {ends['error']} errors of ours, {len(self.wrong)} wrong   "
        )

    def table(self) -> str:
        kinds = list(dict.fromkeys(KINDS))
        rows = [f"{'':10}" + "".join(f"{kind:>16}" for kind in kinds)]
        rows += [f"{what:10}" + "".join(f"{self.struck[what, kind]:16}" for kind in kinds) for what in STRIKES]
        return "\n".join([*rows, *(f"{count:8} {said}" for said, count in sorted(self.outcomes.items()))])


def main(seconds: float, seed: int) -> int:
    prctl.set_child_subreaper(1)
    print(f"chaos: seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as cache:
        os.chmod(cache, 0o755)
        storm = Storm(seed, cache, quiet=not sys.stdout.isatty())
        storm.blow(seconds)
    if not storm.quiet:
        print("\r", end="")
    print(f"{storm.line()}\n{storm.table()}")
    print("\n".join(storm.wrong[:20]))
    return 1 if storm.wrong else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else secrets.randbelow(1 << 31)))
