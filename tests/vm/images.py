"""What test machines are made of: root file systems and kernels, built once and kept in the user's cache, never in the checkout.

An image is built beside its place and renamed into it when it is whole, so a build that was interrupted leaves nothing that looks good.
Its name holds a checksum of everything that it was made from: a change there makes a new one, and the old one goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsjail_py" / "vm"
DISTROS = {"debian12": "bookworm", "debian13": "trixie", "debian13-selinux": "trixie", "debian-testing": "forky"}
"""Machines that can be built here, and their Debian suites."""
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "backports": "trixie-backports", "testing": "forky"}
"""Kernels that any of them can be booted with, and the suites that have them."""
NEEDED = 6 << 30
"""Bytes that must be free before a build begins; an image takes about 1.5 GB."""
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".dev-lock", ".vagrant", "build", "dist", "*.egg-info", "__pycache__", "*.so", "nsjail-launcher*", ".*_cache",
    ".hypothesis", ".benchmarks", "*.box", "*.img",
)  # fmt: skip


class TroubleError(Exception):
    """There is no machine, for a reason that one line can say."""


def say(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)


def root(distro: str) -> Path:
    """The image of the root file system of a distribution."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    packages = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        project["project"]["optional-dependencies"]["test"],
    ]
    made_from = [
        HERE / "build-root.sh",
        HERE / "in-root.sh",
        *_files(HERE / "guest", "vm-job*", "*.pub"),
        *_files(TOP / "vagrant" / "provision", "debian.sh"),
    ]
    made_from += _files(TOP / "vagrant" / "provision", "systemd.sh", "venv.sh")
    return _image("root", distro, [DISTROS[distro], repr(packages), *map(Path.read_text, made_from)], _build_root) / "root.img"


def security(distro: str) -> str:
    """The security module of a machine: a kernel has one that labels processes."""
    return "selinux" if distro.endswith("-selinux") else "apparmor"


def kernel(name: str) -> Path:
    """The directory of a kernel: `vmlinuz`, `initrd`, `modules.img` and `release`."""
    made_from = [HERE / "build-kernel.sh", HERE / "guest" / "init"]
    return _image("kernel", name, [KERNELS[name], *map(Path.read_text, made_from)], _build_kernel)


def copy_checkout(target: Path) -> None:
    """The checkout without what was made in it, and without what vanished meanwhile."""
    try:
        shutil.copytree(TOP, target, ignore=NOT_SOURCE, symlinks=True)
    except shutil.Error as error:
        for source, _, why in error.args[0]:
            if os.path.lexists(source):
                raise TroubleError(f"cannot copy {source}: {why}") from None


def require_space(needed: int, purpose: str) -> None:
    if (free := shutil.disk_usage(CACHE).free) < needed:
        raise TroubleError(f"{CACHE} has {free >> 20} MiB free, and {purpose} needs {needed >> 20}")


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _build_root(name: str, part: Path) -> list[str]:
    copy_checkout(part / "checkout")
    passed = [f"{key}={os.environ[key]}" for key in ("PIP_CERT", "PIP_INDEX_URL", "DEV_VM_MIRROR") if key in os.environ]
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    built = [DISTROS[name], security(name), str(part / "root.img"), str(part / "checkout")]
    return [*as_root, "env", *passed, "sh", str(HERE / "build-root.sh"), *built]


def _build_kernel(name: str, part: Path) -> list[str]:
    return ["sh", str(HERE / "build-kernel.sh"), KERNELS[name], str(part)]


@contextlib.contextmanager
def _lock() -> Iterator[IO[str]]:
    """One build at a time; whoever waited finds it done. It is a build's standard input, too, which sudo passes on: one that outlives us keeps it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for whoever inherited it


def _image(kind: str, name: str, made_from: list[str], build: Callable[[str, Path], list[str]]) -> Path:
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:12]
    place = CACHE / f"{kind}-{name}-{digest}"
    if place.is_dir():
        return place
    with _lock() as lock:
        if place.is_dir():
            return place
        for half in CACHE.glob("*.part"):  # of a build that was killed
            _remove(half)
        require_space(NEEDED, f"building the {kind} {name}")
        older = [path for path in CACHE.iterdir() if path.name.rpartition("-")[0] == f"{kind}-{name}"]
        part = place.with_name(place.name + ".part")
        part.mkdir()
        try:
            say(f"building the {kind} {name}, once ({'about two minutes' if kind == 'root' else 'a few seconds'}): {place}")
            began = time.monotonic()
            _run(build(name, part), part / "log", lock)
            shutil.rmtree(part / "checkout", ignore_errors=True)
            _sync(part)
            part.rename(place)
            say(f"built in {time.monotonic() - began:.0f} s")
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
    return place


def _remove(half: Path) -> None:
    """Also what root's part of a build has left there."""
    try:
        shutil.rmtree(half)
    except PermissionError:
        if subprocess.run(["sudo", "-n", "rm", "-rf", "--one-file-system", half], capture_output=True, check=False).returncode:
            raise TroubleError(f"a build that was killed has left root's files: sudo rm -rf --one-file-system {half}") from None


def _sync(folder: Path) -> None:
    """Or a host that loses its power may keep the name and not what it stands for."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _run(command: list[str], log: Path, lock: IO[str]) -> None:
    """Runs a build; its stages go to standard error, the rest to the log. Whatever ends us ends it."""
    if command[0] == "sudo":
        subprocess.run(["sudo", "-v"], check=False)
    least = shutil.disk_usage(CACHE).free
    with open(log, "wb") as file:
        build = subprocess.Popen(command, stdin=lock, stdout=sys.stderr, stderr=file, process_group=0)
    try:
        while (status := build.poll()) is None:
            least = min(least, shutil.disk_usage(CACHE).free)  # afterwards its files are gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                build.wait(0.2)
    except BaseException:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(build.pid, signal.SIGTERM)
        build.wait()
        raise
    if status:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        space = ["the disk was full"] if least < 64 << 20 else []
        script = next(Path(word).name for word in command if word.endswith(".sh"))
        raise TroubleError(": ".join([f"{script} failed ({status})", *space, *last]))
