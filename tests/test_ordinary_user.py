"""Root's run of the suite includes a second one, as a user with no right at all. It goes on beside root's own (conftest.py starts it)."""

from __future__ import annotations

import os
import time

import pytest
from conftest import IS_ROOT, BesideUs

SUITES = [
    "escape",
    "test_run.py",
    "test_processor_time.py",
    "test_holes.py",
    "test_rootfs.py",
    "test_cli.py",
    "test_alone.py",
    "test_saved.py",
    "test_bad_input.py",
    "test_stock.py",
    "test_retry.py",
    "test_nesting.py",
    "test_warm.py",
    "test_snapshot.py",
    "test_session.py",
    "test_stream.py",
    "test_embedding.py",
    "test_programs.py",
    "test_cachedir.py",
    "test_selftest.py",
    "test_faults.py",
    "test_chaos.py",
    "test_exhaustion.py",
    "test_learn.py",
    "test_withheld.py",
    "test_layers_audit.py",
    "test_oci_image.py",
    "test_oci_runtime.py",
    "test_oci_seccomp.py",
]


WITH_JOBS = {"test_warm.py", "test_snapshot.py", "test_chaos.py", "test_exhaustion.py", "test_session.py", "test_stream.py"}
"""All about warm jobs, which ./dev test --sanitize has only as root (ordinary.py)."""


@pytest.mark.skipif(not IS_ROOT, reason="this is the run of an ordinary user")
@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_holds_for_an_ordinary_user(suite: str, beside_us: BesideUs) -> None:
    if "SANITIZED" in os.environ and suite in WITH_JOBS:
        pytest.skip("AddressSanitizer does not start below RLIMIT_DATA")
    status, log = beside_us.home / f"{suite}.status", beside_us.home / f"{suite}.log"
    while not status.exists():
        assert os.path.exists(f"/proc/{beside_us.pid()}"), "it has ended before its time"
        time.sleep(0.1)
    assert status.read_text() == "0", log.read_text(errors="replace")[-8000:]
