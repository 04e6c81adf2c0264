"""Many warm jobs at one time: all of them are one user of the host's, and their template makes one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE

from nsjail_py import PIPE, Jail, Process
from nsjail_py.policy import Policy

KEYS = int(Path("/proc/sys/kernel/keys/maxkeys").read_text()) if Path("/proc/sys/kernel/keys/maxkeys").exists() else 0
MANY = KEYS + 30
few_keys = pytest.mark.elsewhere(not 0 < KEYS <= 900, why=f"a user may have {KEYS} keys, and there are 1,024 runs")
WAITS = "import sys; print('here', flush=True); sys.stdin.read()"
CALLS = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]
PUTS = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
added = libc.syscall({CALLS[0]}, b'user', b'canary', b's3cret', 6, -3)
print(added > 0, ctypes.get_errno() * (added < 0))
"""
"""A key into the keyring of its session."""


@contextlib.contextmanager
def many(jail: Jail, count: int) -> Iterator[None]:
    """So many that run at one time."""
    started: list[Process] = []
    try:
        started.extend(jail.start_python(WAITS, stdin=PIPE, stdout=PIPE) for _ in range(count))
        for process in started:
            assert process.stdout and process.stdout.read(5) == b"here\n", process.poll()
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.communicate()


@few_keys
def test_there_are_more_jobs_than_a_user_may_have_keys() -> None:
    """And they are no load on the memory that their template may have."""
    with Jail("untrusted", preload=[], memory="64M", wall_time=60 * PATIENCE) as jail, many(jail, MANY):
        assert jail.run_python("print(1)").check().stdout == b"1\n"


@few_keys
def test_a_job_without_a_keyring_of_its_own_can_keep_nothing_in_another() -> None:
    """Each that has none would else have the same."""
    bare = Policy(name="bare", landlock=False, best_effort=("own_uid", "groups", "cgroup", "swap", "nested_userns"))
    with Jail(bare, preload=["ctypes"], wall_time=60 * PATIENCE) as jail:
        assert jail.run_python(PUTS).check().stdout == b"True 0\n"
        with many(jail, MANY):
            assert jail.run_python(PUTS).check().stdout == b"False 128\n"  # EKEYREVOKED


@pytest.mark.elsewhere(not IS_ROOT, why="only root may have more room on a socket than everybody")
def test_as_many_jobs_may_be_asked_for_at_one_time_as_there_are_runs() -> None:
    with Jail("untrusted", preload=[], stock=0, wall_time=60 * PATIENCE) as jail:
        jail.run_python("1").check()
        started = [jail.start_python("import time; time.sleep(600)") for _ in range(600)]
        try:
            assert all(process.pid for process in started)
        finally:
            for process in started:
                process.kill()
        assert {process.wait().verdict for process in started} == {"killed"}
