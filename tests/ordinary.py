"""Runs suites as a user with no right at all, beside root's own run of them: `ordinary.py DIRECTORY SUITE...`.

It leaves the caller's process tree at once, so that what is counted there is the caller's own; it ends when its standard input does. Of
each suite DIRECTORY/SUITE.log has what pytest said, and then DIRECTORY/SUITE.status its exit status.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOBODY = 65534
OURS = ("nsjail_py", "native", "policies", "tests", "examples", "benchmarks", "README.md", "docs")


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


def prepare(home: Path) -> Path:
    """A home with an interpreter that has the packages and the project; gives where the project is."""
    site, project = sysconfig.get_path("purelib"), ROOT
    changing = shutil.ignore_patterns("__pycache__", "ruff*", "mypy*")
    if not usable_by_all(site):
        shutil.copytree(site, home / "site-packages", ignore=changing)
        site = str(home / "site-packages")
    if not usable_by_all(str(ROOT / "nsjail_py")):
        for name in OURS:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, home / name, ignore=changing)
            else:
                shutil.copy(ROOT / name, home / name)
        project = home
    user = home / "user"
    user.mkdir()
    (user / "tmp").mkdir()
    subprocess.run([python_for_all(), "-m", "venv", "--without-pip", str(user / "venv")], check=True)
    packages = next((user / "venv").glob("lib/python*/site-packages"))
    (packages / "here.pth").write_text(f"{site}\n{project}\n")
    for here, folders, files in os.walk(user):
        for name in (".", *folders, *files):
            os.chown(os.path.join(here, name), NOBODY, NOBODY, follow_symlinks=False)
    return project


def run(home: Path, project: Path, suite: str) -> None:
    user = home / "user"
    environment = {"HOME": str(user), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {name: os.environ[name] for name in ("TEST_PATIENCE", "SANITIZED", "PYTHONPATH") if name in os.environ}
    command = [str(user / "venv/bin/python"), "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={user}/tmp/{suite}"]
    if "SANITIZED" in os.environ:  # a job's reaper has no room for ASan's shadow where RLIMIT_DATA stands for a control group
        command += ["-k", "not warm"]
    with (home / f"{suite}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(project / "tests" / suite)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd=user,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None:
            if select.select([0], [], [], 0.2)[0]:  # its end is our caller's
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                shutil.rmtree(home, ignore_errors=True)
                sys.exit(1)
    fresh = home / f"{suite}.new"
    fresh.write_text(str(process.returncode))
    fresh.rename(home / f"{suite}.status")


def main(home: Path, suites: list[str]) -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    (home / "pid").write_text(str(os.getpid()))
    project = prepare(home)
    for suite in suites:
        run(home, project, suite)
    select.select([0], [], [])
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
