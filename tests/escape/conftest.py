"""Canaries, and programs compiled once."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import runner


@pytest.fixture(scope="module", autouse=True)
def no_warm_interpreter() -> Iterator[None]:
    """The one that attacks were last tried in ends with its file."""
    yield
    runner.close_warm()


HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attacks written in C, static, and one for 32 bits without a C library."""
    top = tmp_path_factory.mktemp("programs")
    for source in sorted(HERE.glob("*.c")):
        flags = ["-m32", "-nostdlib", "-fno-pie", "-no-pie", "-fno-stack-protector"] if source.stem == "elf32" else []
        subprocess.run(
            ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", *flags, str(source), "-o", str(top / source.stem)], check=True
        )
    return top


@pytest.fixture(scope="module")
def secret() -> Iterator[Path]:
    """A file that everybody on the host may read, in a directory that no jail shows."""
    top = Path(tempfile.mkdtemp(prefix="canary-"))
    top.chmod(0o777)
    path = top / "secret"
    path.write_text("s3cret-canary")
    path.chmod(0o666)
    yield path
    assert path.read_text() == "s3cret-canary", "an attack inside reached the canary"
    shutil.rmtree(top)


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user, outside of every jail."""
    process = runner.canary_process()
    yield process
    runner.stop(process)
