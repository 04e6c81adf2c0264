"""Whatever is killed or stopped, whenever: the caller gets a right result or an error of ours, and nothing is left. `./dev chaos` goes on
for longer, and repeats a storm by its seed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE, importing_ours

import nsjail_py
from nsjail_py import launcher

SECONDS = 10 if IS_ROOT else 5


def test_no_kill_at_any_moment_gives_a_wrong_result_or_leaves_anything(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "chaos.storm", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, env=importing_ours(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with capsys.disabled():
        print(f" [{done.stdout.splitlines()[1].strip()}]", end="")


def test_a_launcher_that_somebody_has_stopped_does_not_hold_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "END_S", 0.5)
    process = nsjail_py.Jail("untrusted").start(["/bin/cat"], stdin=nsjail_py.PIPE)
    program, stopped = process.pid, launcher.current().pid
    os.kill(stopped, signal.SIGSTOP)
    launcher.shutdown()
    assert not Path(f"/proc/{stopped}").exists()
    with pytest.raises(nsjail_py.LauncherDied):
        process.wait(timeout=5 * PATIENCE)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{program}").exists():
        assert time.monotonic() < deadline, "the jail goes on without its launcher"
        time.sleep(0.01)
    assert nsjail_py.run(["/bin/true"]).ok
