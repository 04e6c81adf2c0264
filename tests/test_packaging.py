"""What is shipped: one wheel that runs on every supported Python without a compiler, and a source archive that can make it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from nsjail_py.options import parser

VERSIONS = range(11, 15)
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "nsjail-launcher*", "results")
PT_INTERP = 3


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def pythons() -> list[str]:
    """Every interpreter of a supported version that works here: ours, those on PATH, those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {sys.version_info[1]: getattr(sys, "_base_executable", sys.executable)}
    for minor in VERSIONS:
        candidates = [shutil.which(f"python3.{minor}"), *sorted(pyenv.glob(f"3.{minor}.*/bin/python3.{minor}"))]
        for candidate in filter(None, candidates):
            if (
                minor not in found
                and subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0
            ):
                found[minor] = str(candidate)
    return [found[minor] for minor in sorted(found)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as a fresh clone has them, in a path with a space."""
    copy = tmp_path_factory.mktemp("a clone") / "nsjail_py"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", out, cwd=source)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, so that whatever that lacks is missed here."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, sdist)
    return next(out.iterdir())


def test_the_source_archive_has_all_that_the_build_reads(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(source)) for folder in ("native", "policies", "nsjail_py", "tests") for path in (source / folder).rglob("*.*")
    }
    assert wanted - held == set()
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= held


def test_one_wheel_serves_every_python_from_3_11_on(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]


def test_the_wheel_holds_the_policies_the_types_and_the_launcher(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        mode = archive.getinfo("nsjail_py/nsjail-launcher").external_attr >> 16
    policies = {f"nsjail_py/policies/{path.name}" for path in (ROOT / "policies").glob("*.toml")}
    modules = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.toml") for path in (ROOT / "nsjail_py").rglob(kind)}
    assert modules | policies | {"nsjail_py/py.typed", "nsjail_py/_native.abi3.so"} <= names
    assert stat.S_IMODE(mode) == 0o755


def test_nothing_of_the_host_is_loaded_into_the_launcher(wheel: Path) -> None:
    """It has no interpreter: no dynamic loader takes part, no library of the host, and none that a variable names."""
    with zipfile.ZipFile(wheel) as archive:
        elf = archive.read("nsjail_py/nsjail-launcher")
    assert elf[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    kinds = [struct.unpack_from("<I", elf, table + size * number)[0] for number in range(count)]
    assert PT_INTERP not in kinds


def tried(venv: Path, environment: dict[str, str], folder: Path) -> list[str]:
    """What an installation says when it is tried from a directory of its own: the command, and smoke.py."""
    (folder / "hello.py").write_text("import sys; print('hello from', sys.version_info[1])")
    said = run(venv / "bin/nsjail-py", "run", "hello.py", env=environment, cwd=folder)
    return [said.strip(), run(venv / "bin/python", ROOT / "tests/smoke.py", env=environment, cwd=folder).strip()]


@pytest.mark.slow
@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
def test_the_wheel_runs_a_jail_without_a_compiler(python: str, wheel: Path, tmp_path: Path) -> None:
    run(python, "-m", "venv", tmp_path / "venv")
    # As on a machine that has none: whatever would compile something fails.
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false", "NSJAIL_PY_CACHE": str(tmp_path / "cache")}
    (tmp_path / "cache").mkdir(mode=0o755)
    run(tmp_path / "venv/bin/pip", "install", "-q", "--only-binary=cffi,msgspec", f"{wheel}[warm]", env=environment)
    minor = run(python, "-c", "import sys; print(sys.version_info[1])").strip()
    assert tried(tmp_path / "venv", environment, tmp_path) == [f"hello from {minor}", f"every way in works on Python 3.{minor}"]


@pytest.mark.slow
def test_pip_installs_a_clone(source: Path, tmp_path: Path) -> None:
    """With nothing in the virtual environment but pip, which gets what the build asks for."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    environment = {**os.environ, "NSJAIL_PY_CACHE": str(tmp_path / "cache")}
    (tmp_path / "cache").mkdir(mode=0o755)
    run(tmp_path / "venv/bin/pip", "install", "-q", f"{source}[warm]", env=environment)
    assert tried(tmp_path / "venv", environment, tmp_path)[1].startswith("every way in works")


def test_a_second_build_compiles_nothing_and_a_changed_source_is_compiled(source: Path) -> None:
    launcher = source / "nsjail_py/nsjail-launcher"

    def built() -> int:
        run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source)
        return launcher.stat().st_mtime_ns

    first = built()
    assert built() == first
    os.utime(source / "native/plan.h")
    assert built() > first


def test_the_compiler_and_its_flags_are_the_users_choice(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "my cc"
    compiler.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{tmp_path}/said"\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": f"'{compiler}'", "CFLAGS": "-DMARK='a b'"}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force", cwd=source, env=environment)
    assert any("nsjail-launcher" in line and "-DMARK=a b" in line for line in (tmp_path / "said").read_text().splitlines())


def test_the_help_of_dev_lists_every_command_that_it_knows() -> None:
    script = (ROOT / "dev").read_text()
    arms = re.findall(r"^    ([a-z| -]+)\)", script[script.index("case $command in") :], re.M)
    known = {word.strip() for arm in arms for word in arm.split("|")}
    said = run("sh", ROOT / "dev", "help")
    commands = {word for word in known if word.isalpha() and word != "help"}
    assert set(parser()._subparsers._group_actions[0].choices) <= commands  # those of nsjail-py, too
    assert {"setup", "run", "test", "check"} <= commands
    assert [word for word in commands if word not in said] == []


def test_an_unknown_command_of_dev_is_refused_with_the_list() -> None:
    done = subprocess.run(["sh", str(ROOT / "dev"), "frobnicate"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unknown command: frobnicate" in done.stderr
    assert "./dev COMMAND" in done.stderr
