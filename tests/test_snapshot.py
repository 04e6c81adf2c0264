"""A template's memory as a file: the same bytes at the same places, for this process and for its children, and nobody writes to the file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import IS_ROOT

import nsjail_py
from nsjail_py import Jail, warm

PREPARED = """
import ctypes, importlib.machinery, importlib.util, mmap, os, re, resource, sys, tempfile
loader = importlib.machinery.ExtensionFileLoader("_template", sys.argv[1])
_template = importlib.util.module_from_spec(importlib.util.spec_from_loader("_template", loader))
M = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
def address(memory): return ctypes.addressof(ctypes.c_char.from_buffer(memory))
def anonymous(size=M, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS): return mmap.mmap(-1, size, flags)
def regions():
    for text in re.split(r"\\n(?=[0-9a-f]+-)", open("/proc/self/smaps").read()):
        start, end = (int(number, 16) for number in text.split()[0].split("-"))
        yield start, end, text
def mapped(memory, at=0):
    return next(text for start, end, text in regions() if start <= address(memory) + at < end)
def in_child(check):
    pid = os.fork()
    if pid == 0:
        try: check(); os._exit(0)
        except BaseException as error: print("in the child:", repr(error), flush=True); os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
large = anonymous(12 * M)
for at in range(0, len(large), 4096): large[at:at + 8] = at.to_bytes(8, "little")
"""


def process(code: str) -> None:
    spec = importlib.util.find_spec("nsjail_py._template")  # loaded there, and not here
    assert spec and spec.origin
    command = [sys.executable, "-c", PREPARED + code, spec.origin]
    with getattr(warm, "open", open)(os.devnull, "r+b", 0) as null:  # as a template's, by which ./dev coverage counts
        done = subprocess.run(command, stdin=null, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stdout + done.stderr


def test_the_memory_is_the_same_and_forks_copy_none_of_it() -> None:
    process("""
def check(): assert all(large[at:at + 8] == at.to_bytes(8, "little") for at in range(0, len(large), 4096))
_template.snapshot()
assert "/memfd:template" in mapped(large)
def untouched():
    text = mapped(large)
    assert re.search(r"Rss:\\s+0 kB", text), text
in_child(untouched)
in_child(check)
check()
print("same")
""")


def test_what_one_process_writes_no_other_sees() -> None:
    process("""
_template.snapshot()
def write():
    large[:] = b"x" * len(large)
    grown = [bytearray(1000) for _ in range(100_000)]
in_child(write)
assert large[8:4096] == bytes(4088)
large[0:1] = b"y"
def check(): assert large[0:1] == b"y"; large[0:1] = b"z"
in_child(check)
assert large[0:1] == b"y"
print("same")
""")


def test_memory_that_a_fork_treats_in_its_own_way_stays_as_it_is() -> None:
    process("""
kept = {}
for name, advice in (("wiped", 18), ("not forked", mmap.MADV_DONTFORK)):
    kept[name] = anonymous()
    kept[name][:] = b"k" * M
    kept[name].madvise(advice)
kept["shared"] = anonymous(flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
kept["shared"][:] = b"k" * M
kept["locked"] = anonymous(65536)
kept["locked"][:] = b"k" * 65536
assert libc.mlock(ctypes.c_void_p(address(kept["locked"])), ctypes.c_size_t(65536)) == 0
_template.snapshot()
assert not [name for name, memory in kept.items() if "memfd:template" in mapped(memory)]
def check():
    assert kept["wiped"][:] == bytes(M)
    assert not any(start <= at < end for start, end, _ in regions()), "not forked"
    kept["shared"][0:1] = b"s"
at = address(kept["not forked"])
in_child(check)
assert kept["wiped"][:] == kept["not forked"][:] == b"k" * M and kept["shared"][0:2] == b"sk"
print("same")
""")


def test_what_was_never_written_to_takes_no_memory() -> None:
    process("""
sparse, size = anonymous(256 * M), 256 * M
for at in (0, 4096, 100 * M, size - 4096): sparse[at:at + 4] = b"here"
with tempfile.TemporaryFile() as file:
    file.truncate(size)
    copied = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE)
copied[50 * M:50 * M + 4] = b"here"
_template.snapshot()
for memory, places in ((sparse, (0, 4096, 100 * M, size - 4096)), (copied, (50 * M,))):
    assert all(memory[at:at + 4] == b"here" and "memfd:template" in mapped(memory, at) for at in places)
    assert "memfd:template" not in mapped(memory, 30 * M) and memory[30 * M:30 * M + 4] == bytes(4)
template = sum(end - start for start, end, text in regions() if "memfd:template" in text)
assert template < 32 * M, template
print("same")
""")


@pytest.mark.elsewhere(not IS_ROOT, why="only root can open a file by where it is mapped")
def test_the_file_can_be_changed_by_nobody() -> None:
    process("""
_template.snapshot()
start, end, text = next(region for region in regions() if "memfd:template" in region[2])
file = os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDWR)
for change in (lambda: os.pwrite(file, b"x", 0), lambda: os.ftruncate(file, 0), lambda: mmap.mmap(file, 4096)):
    try: change(); print("changed")
    except PermissionError: pass
print("same")
""")


def test_what_may_only_be_read_is_still_only_read() -> None:
    process("""
fixed = anonymous()
fixed[:] = b"f" * M
assert libc.mprotect(ctypes.c_void_p(address(fixed)), ctypes.c_size_t(M), 1) == 0
_template.snapshot()
start, end, text = next(region for region in regions() if region[0] <= address(fixed) < region[1])
assert "memfd:template" in text and text.split()[1] == "r--p" and fixed[:] == b"f" * M
print("same")
""")


def test_a_small_process_stays_as_it_is() -> None:
    process("""
large.madvise(mmap.MADV_DONTNEED)
_template.snapshot()
assert not [text for _, _, text in regions() if "memfd:template" in text]
print("same")
""")


def test_a_process_that_is_given_no_file_stays_as_it_is() -> None:
    process("""
for most in range(3, 8):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, 64))
    _template.snapshot()
    assert all(large[at:at + 8] == at.to_bytes(8, "little") for at in range(0, len(large), 4096))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
assert "memfd:template" in mapped(large)
print("same")
""")


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with Jail("untrusted", preload=["numpy"], stock=1) as jail:
        yield jail


def test_a_job_finds_its_templates_memory_in_a_file_that_it_cannot_open_or_write(jail: Jail) -> None:
    source = """
import os
lines = [line.split() for line in open("/proc/self/maps") if "memfd:template" in line]
assert sum(int(line[0].split("-")[1], 16) - int(line[0].split("-")[0], 16) for line in lines) > 8 << 20
assert {line[1] for line in lines} <= {"rw-p", "r--p"}, lines
for line in lines:
    for flags in (os.O_RDONLY, os.O_RDWR):
        try: os.open(f"/proc/self/map_files/{line[0]}", flags); print("opened")
        except OSError: pass
print("done")
"""
    assert jail.run_python(source).check().stdout == b"done\n"


def test_no_job_writes_what_another_reads(jail: Jail) -> None:
    for _ in range(3):
        jail.run_python("import numpy\nassert not hasattr(numpy, 'spoilt')\nnumpy.spoilt = 1").check()


def test_a_session_over_it_goes_back_to_where_it_was() -> None:
    with nsjail_py.Jail("untrusted", preload=["numpy"]) as jail, jail.session() as session:
        session.run("import numpy; x = numpy.ones(1 << 20)")
        session.checkpoint()
        session.run("x[:] = 2; numpy.spoilt = 1")
        session.restore()
        assert session.run("(int(x.sum()), hasattr(numpy, 'spoilt'))").check().value == f"({1 << 20}, False)"
