"""Root's run of the suite includes a second one, as a user with no right at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, ROOT

NOBODY = 65534
SUITES = [
    "test_run.py",
    "test_holes.py",
    "test_cli.py",
    "test_bad_input.py",
    "test_stock.py",
    "test_warm.py",
    "test_embedding.py",
    "test_programs.py",
    "test_cachedir.py",
    "test_selftest.py",
    "test_faults.py",
    "test_chaos.py",
    "test_exhaustion.py",
    "test_learn.py",
    "test_layers_audit.py",
    "test_oci.py",
    "escape",
]


def usable_by_all(path: str) -> bool:
    """Whether an ordinary user gets to this path and may read or execute it."""
    return all(os.stat(part).st_mode & 0o005 == 0o005 for part in (Path(path).resolve(), *Path(path).resolve().parents))


def python_for_all() -> str:
    """An interpreter of this version that an ordinary user can execute."""
    base = getattr(sys, "_base_executable", sys.executable)
    for path in (base, f"/usr/bin/python3.{sys.version_info[1]}"):
        if os.path.exists(path) and usable_by_all(path):
            return path
    raise AssertionError(f"no interpreter of version 3.{sys.version_info[1]} that an ordinary user may execute: {base} is private")


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ordinary-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(not IS_ROOT, reason="this is the run of an ordinary user")
@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_holds_for_an_ordinary_user(suite: str, home: Path) -> None:
    site, project = sysconfig.get_path("purelib"), ROOT
    if not usable_by_all(site):
        shutil.copytree(site, home / "site-packages", ignore=shutil.ignore_patterns("__pycache__", "ruff*", "mypy*"))
        site = str(home / "site-packages")
    if not usable_by_all(str(ROOT / "nsjail_py")):
        for name in ("nsjail_py", "native", "policies", "tests", "examples", "benchmarks", "README.md", "docs"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, home / name)
        project = home
    user = home / "user"
    user.mkdir()
    subprocess.run([python_for_all(), "-m", "venv", "--without-pip", str(user / "venv")], check=True)
    packages = next((user / "venv").glob("lib/python*/site-packages"))
    (packages / "here.pth").write_text(f"{site}\n{project}\n")
    for here, folders, files in os.walk(user):
        for name in (".", *folders, *files):
            os.chown(os.path.join(here, name), NOBODY, NOBODY, follow_symlinks=False)
    command = [
        str(user / "venv/bin/python"),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--basetemp={user}/tmp",
        str(project / "tests" / suite),
    ]
    done = subprocess.run(
        command,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd=user,
        env={"HOME": str(user), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
