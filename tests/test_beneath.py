"""native/beneath.c: a target is what openat2 finds beneath the new root, also where openat2 is withheld, and never anything else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

WITHHELD = """
import ctypes, errno, os, sys
import pyseccomp
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
filter.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "openat2")
filter.load()
os.execv(sys.argv[1], sys.argv[1:])
"""
NAMES = ("a", "b", "c", "file", "link", "up", "loop", ".", "..")


def withheld(*command: str | Path) -> list[str | Path]:
    """The command, under a filter as systemd's RestrictSUIDSGID= is one."""
    return [sys.executable, "-c", WITHHELD, *command]


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("lookup") / "lookup"
    sources = [ROOT / "tests/beneath.c", ROOT / "native/beneath.c"]
    compiler = os.environ.get("COVERING_CC", "gcc")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'native'}"]
    subprocess.run([compiler, *flags, "-o", program, *sources], check=True)
    return program


def found(command: list[str | Path], paths: list[str]) -> list[str]:
    done = subprocess.run(command, input="\n".join(paths), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def some_path(dice: random.Random, most: int) -> str:
    return "/" * dice.randrange(3) + "/".join(dice.choice(NAMES) for _ in range(dice.randrange(1, most)))


def some_tree(top: Path, dice: random.Random, depth: int = 0) -> None:
    """Directories, files, and links with any text: absolute, upward out of the root, to themselves, to nothing."""
    top.mkdir()
    for name in NAMES[:-2]:
        if name in ("a", "b", "c") and depth < 3 and dice.random() < 0.9:
            some_tree(top / name, dice, depth + 1)
        elif dice.random() < 0.6:
            (top / name).symlink_to(some_path(dice, 7)) if name != "file" else (top / name).touch()


@pytest.mark.parametrize("seed", range(6))
def test_every_path_leads_to_what_openat2_finds(seed: int, lookup: Path, tmp_path: Path) -> None:
    dice = random.Random(seed)
    (tmp_path / "a").mkdir()  # what is beside the root has the names of what is in it
    (tmp_path / "file").touch()
    some_tree(tmp_path / "root", dice)
    for name in ("root/out", "root/a-link"):
        (tmp_path / name).symlink_to("../" * 20 + str(tmp_path)[1:])
    paths = [some_path(dice, 9) for _ in range(4000)] + ["out/file", "a-link/a", "/", "x" * 300, "a/" * 2500, "../../..", "a/" * 2050]
    paths += [f"{path}/" for path in ("file", "a", "a/file", "link", "up", "loop", "out/file")]
    theirs, ours = found([lookup, tmp_path / "root"], paths), found(withheld(lookup, tmp_path / "root"), paths)
    assert len(ours) == len(paths)
    assert [(path, one, other) for path, one, other in zip(paths, theirs, ours, strict=True) if one != other] == []
    assert len(set(theirs)) > 10


def test_a_directory_that_becomes_a_link_in_the_middle_of_a_look_leads_nowhere_else(lookup: Path, tmp_path: Path) -> None:
    root, ended = tmp_path / "root", threading.Event()
    for name in ("root/d/e", "root/elsewhere", "d/e", "e"):
        (tmp_path / name).mkdir(parents=True)
    (root / "l").symlink_to("../" * 20 + str(tmp_path)[1:] + "/d")

    def exchange() -> None:
        while not ended.is_set():
            os.rename(root / "d", root / "elsewhere/d")
            os.rename(root / "l", root / "d")
            os.rename(root / "d", root / "l")
            os.rename(root / "elsewhere/d", root / "d")

    racer = threading.Thread(target=exchange)
    racer.start()
    try:
        paths = ["d/e", "d/../d/e", "d/../../e", "d/e/../e", "elsewhere/d/../../d/e"] * 3000
        said = {word for line in found(withheld(lookup, root), paths) for word in line.split()}
    finally:
        ended.set()
        racer.join()
    inside = os.stat(root / "d/e")
    assert {word for word in said if ":" in word} == {f"{inside.st_dev}:{inside.st_ino}"}


def test_a_target_is_found_while_the_host_mounts_and_renames(lookup: Path, tmp_path: Path) -> None:
    """openat2 answers EAGAIN to a ".." then, also in a tree that nobody touches."""
    for name in ("root/a/b", "one"):
        (tmp_path / name).mkdir(parents=True)
    ended = threading.Event()

    def rename() -> None:
        while not ended.is_set():
            os.rename(tmp_path / "one", tmp_path / "other")
            os.rename(tmp_path / "other", tmp_path / "one")

    racer = threading.Thread(target=rename)
    racer.start()
    try:
        said = set(found([lookup, tmp_path / "root"], ["a/../a/../a/b/../../a/b"] * 20000))
    finally:
        ended.set()
        racer.join()
    assert len(said) == 1 and "unavailable" not in said.pop()


def test_more_links_than_the_kernel_follows_are_an_error(lookup: Path, tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / str(number)).symlink_to(str(number + 1))
    assert found(withheld(lookup, tmp_path), ["0", "9", "10"]) == found([lookup, tmp_path], ["0", "9", "10"])


def test_a_path_that_a_link_makes_too_long_is_an_error(lookup: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("./" * 40)
    assert found(withheld(lookup, tmp_path), ["link/" + "./" * 2040]) == ["File name too long " * 2]


def test_jails_are_the_same_where_openat2_is_withheld() -> None:
    """The tests of what is shown inside, and of targets that links in a root would lead to the host."""
    chosen = "a_link_in_a_root or every_mount_is_private or target or shown or work_directory or mount"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    files = [ROOT / "tests" / name for name in ("escape/test_shown.py", "test_bad_input.py", "test_run.py")]
    done = subprocess.run(withheld(*command, *files), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
