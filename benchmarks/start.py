"""/bin/true to its end, and how many of them in a second."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from peers import Once, Peer, programs, spawn, timed
from rows import Target, protections

import nsjail_py
from nsjail_py import Jail

TRUE = ["/bin/true"]
BARE, STOCK, EMPTY = "posix_spawn, no jail", "from stock", "nothing in stock"
LARGE, ALONE, COMMAND, PYTHON = "from stock, 512 MiB and 20 threads", "launcher alone", "nsjail-py exec", "python3 -c pass, no jail"
RATE = "/bin/true, 8 threads"
HEAVY = """
import sys, threading, time, nsjail_py
heap = bytearray(b"1") * (512 << 20)
for _ in range(20):
    threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
jail = nsjail_py.Jail("untrusted", stock=2, hostname="heavy")
for _ in sys.stdin:
    begin = time.perf_counter()
    jail.run(["/bin/true"]).check()
    print((time.perf_counter() - begin) * 1000, flush=True)
"""
TARGETS = (
    Target(STOCK, 1.3, "times", BARE),
    Target(STOCK, 4, "faster", "bubblewrap --unshare-all"),
    Target(EMPTY, 2.5, "times", BARE),
    Target(LARGE, 1.2, "times", STOCK),
    Target(ALONE, 2.5, "times", BARE),
    Target(COMMAND, 80, "most"),
    Target(RATE, 1000, "least"),
)
RARE = {COMMAND, PYTHON, "firejail", "crun, by our backend", "runsc, by our backend"}
"""Slow ones take their turn in every tenth round."""


def alone(stack: ExitStack) -> Once:
    """A saved plan, run without Python."""
    plan = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "plan"
    subprocess.run([sys.executable, "-m", "nsjail_py", "compile", "untrusted", "-o", str(plan)], check=True, capture_output=True)
    return spawn([str(Path(nsjail_py.__file__).with_name("nsjail-launcher")), str(plan), "--", *TRUE])


def installed(stack: ExitStack) -> str:
    """The interpreter of an environment with the package, what it needs, and nothing else: a developer's has modules that those load, too."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "nsjail_py.pth").write_text(f"{Path(nsjail_py.__file__).parent.parent}\n")
    for requirement in metadata.requires("nsjail_py") or ():
        if "extra ==" in requirement:
            continue
        distribution = metadata.distribution(re.split(r"[^\w.-]", requirement)[0])
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return str(folder / "bin" / "python")


def contestants(stack: ExitStack) -> dict[str, Peer]:
    """The jails of this project differ in a name, so that one's stock is not the other's."""
    stocked, cold = Jail("untrusted", stock=2), Jail("untrusted", stock=0, hostname="cold")
    all_of_them = protections(cold.run(TRUE))
    # As installed: with the compiled modules that the first run leaves.
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        BARE: Peer(spawn(TRUE), "nothing"),
        STOCK: Peer(lambda: stocked.run(TRUE).check() and None, all_of_them),
        EMPTY: Peer(lambda: cold.run(TRUE).check() and None, all_of_them),
        LARGE: Peer(timed(stack, HEAVY), all_of_them),
        ALONE: Peer(alone(stack), all_of_them),
        **programs(TRUE),
        PYTHON: Peer(spawn([sys.executable, "-c", "pass"]), "nothing"),
        COMMAND: Peer(spawn([installed(stack), "-m", "nsjail_py", "exec", "--", *TRUE], compiled), all_of_them),
    }


def rates(stack: ExitStack) -> dict[str, Peer]:
    """What several threads do at once."""
    cells = stack.enter_context(Jail("untrusted", stock=16, hostname="rate"))
    return {RATE: Peer(lambda: cells.run(TRUE).check() and None, protections(cells.run(TRUE)))}
