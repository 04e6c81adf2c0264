"""The shared libraries of a program are found by reading it, and it cannot choose any other file of the host."""

from __future__ import annotations

import contextlib
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from elfmaker import elf as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsjail_py import elf


@pytest.fixture
def program(tmp_path: Path):
    def write(data: bytes, name: str = "program", mode: int = 0o755) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        path.chmod(mode)
        return str(path)

    return write


def test_a_program_of_the_system_needs_its_loader_and_the_c_library():
    names = {os.path.basename(path) for path in elf.closure([os.path.realpath("/bin/true")])}
    assert "libc.so.6" in names
    assert any(name.startswith("ld-linux") for name in names)


def test_every_path_of_a_closure_exists_and_is_absolute():
    found = elf.closure([os.path.realpath(sys.executable)])
    assert found
    assert all(path.startswith("/") and os.path.isfile(path) for path in found)


def test_a_static_program_needs_nothing(program):
    assert elf.closure([program(made())]) == set()


def test_a_script_needs_no_libraries(program):
    assert elf.closure([program(b"#!/bin/sh\n")]) == set()


def test_origin_is_the_directory_of_the_program_and_reaches_what_its_libraries_need(program, tmp_path):
    program(made(["libb.so"]), "liba.so")
    program(made(), "libb.so")
    found = elf.closure([program(made(["liba.so"], "$ORIGIN"))])
    assert found == {str(tmp_path / "liba.so"), str(tmp_path / "libb.so")}


def test_libraries_that_need_each_other_end(program, tmp_path):
    program(made(["libb.so"], "${ORIGIN}"), "liba.so")
    program(made(["liba.so"], "${ORIGIN}"), "libb.so")
    assert len(elf.closure([program(made(["liba.so"], "$ORIGIN"))])) == 2


def test_a_missing_library_is_named_with_who_needs_it(program):
    path = program(made(["libno-such-thing.so.9"]))
    with pytest.raises(ValueError, match=r"program needs libno-such-thing\.so\.9"):
        elf.closure([path])


def test_what_an_extension_module_lacks_is_left_out(program):
    assert elf.closure([], [program(made(["libno-such-thing.so.9"])), program(b"\x7fELF junk" * 20, "broken.so")]) == set()


@pytest.mark.parametrize("how", ["needed", "runpath", "loader"])
def test_a_program_cannot_name_a_file_that_is_no_library(program, tmp_path, how):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    data = {"needed": made([str(secret)]), "runpath": made(["secret"], str(tmp_path)), "loader": made([], None, str(secret))}[how]
    with pytest.raises(ValueError, match="not a library"):
        elf.closure([program(data)])


def test_a_program_cannot_name_a_library_that_only_root_may_read(program, tmp_path):
    library = program(made(), "private.so", 0o600)
    path = program(made(["private.so"], str(tmp_path)))
    if os.geteuid() == 0:
        with pytest.raises(ValueError, match="not a library"):
            elf.closure([path])
    else:  # what an ordinary user brings is his own
        assert elf.closure([path]) == {library}


def test_a_fifo_as_a_loader_or_library_does_not_block(program, tmp_path):
    os.mkfifo(tmp_path / "fifo.so", 0o666)
    for data in (made([], None, str(tmp_path / "fifo.so")), made(["fifo.so"], str(tmp_path))):
        with pytest.raises(ValueError, match="not a library"):
            elf.closure([program(data)])


def test_relative_folders_and_names_mean_nothing(program, tmp_path, monkeypatch):
    program(made(), "liba.so")
    monkeypatch.chdir(tmp_path)
    for data in (made(["liba.so"], "."), made(["./liba.so"])):
        with pytest.raises(ValueError, match=r"liba\.so"):
            elf.closure([program(data)])


def test_too_many_libraries_are_refused(program):
    with pytest.raises(ValueError, match="malformed"):
        elf.read(program(made([f"lib{i}.so" for i in range(elf.MOST_NEEDED + 1)])))


@pytest.mark.parametrize(("folder", "times"), [("$ORIGIN:", 4000), ("$ORIGIN", 64), ("/:", 1), ("/", 65)], ids=str)
def test_too_many_folders_cost_nothing(program, folder, times):
    path = program(made([], (folder * 4000)[:4000], times=times))
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert len(elf.read(path).search) <= elf.MOST_FOLDERS
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_malformed_file_gives_a_value_error_and_nothing_worse(program, data):
    whole = bytearray(made(["liba.so"], "/nowhere", "/lib64/ld.so"))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = program(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    with contextlib.suppress(ValueError):
        elf.closure([path])
