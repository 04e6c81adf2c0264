"""The file of a saved plan: who may have made it, and what is not believed of it."""

# ruff: noqa: F811 (a fixture that is imported)

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT
from msgspec.structs import replace
from test_alone import COUNTED, UNTRUSTED, alone, counted, edited, nothing_is_left, plans, refused, said  # noqa: F401

import nsjail_py
from nsjail_py._native import ffi
from nsjail_py.cli import SETUP
from nsjail_py.saved import save


@pytest.fixture
def plan(plans: Path, tmp_path: Path) -> Path:
    """A copy for one test to change."""
    return Path(shutil.copy(plans / "any", tmp_path / "plan"))


def test_the_file_is_its_owners_alone(plans: Path) -> None:
    assert (plans / "any").stat().st_mode & 0o777 == 0o600


def test_a_plan_goes_where_a_link_leads_and_never_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    for _ in range(2):  # it is made, and made anew
        save(UNTRUSTED, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and alone(tmp_path / "file", "/bin/true").returncode == 0
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    save(UNTRUSTED, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert os.read(reader, 1 << 16) == (tmp_path / "file").read_bytes()
    os.close(reader)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(mode: int, plan: Path) -> None:
    plan.chmod(mode)
    refused(plan, "nobody else can write")


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(plan: Path) -> None:
    os.chown(plan, 65534, 65534)
    refused(plan, "must be a file that belongs to uid 0")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo"):
        refused(path, "must be a file")
    refused(tmp_path / "none", "No such file")


def test_every_changed_byte_is_found(plan: Path) -> None:
    data = plan.read_bytes()
    for place in [*range(0, 200, 7), *range(200, len(data), len(data) // 40)]:
        changed = bytearray(data)
        changed[place] ^= 0x10
        plan.write_bytes(changed)
        assert alone(plan, "/bin/true").returncode == SETUP, place


FAR = 1 << 30


@pytest.mark.parametrize(
    "change",
    [
        {"release": FAR},
        {"search": 0},
        {"tree": FAR},
        {"locks": FAR},
        {"slot": 0},
        {"slot": FAR},
        *({span: {"offset": FAR, "count": 1}} for span in ("plan", "sources", "groups", "visible", "environment", "passed", "steps")),
    ],
    ids=str,
)
def test_a_reference_to_elsewhere_is_damage_although_the_checksum_is_right(change: dict[str, Any], plan: Path) -> None:
    def edit(head: Any) -> None:
        for name, value in change.items():
            setattr(head, name, value)

    edited(plan, edit)
    refused(plan, "is damaged")


@pytest.mark.parametrize(
    ("table", "kind", "field"),
    [
        ("sources", "saved_file", "path"),
        pytest.param("groups", "saved_group", "group", marks=counted),
        pytest.param("groups", "saved_group", "mount", marks=counted),
    ],
)
def test_a_row_that_leads_elsewhere_is_damage(table: str, kind: str, field: str, plan: Path) -> None:
    def edit(head: Any) -> None:
        span = getattr(head, table)
        setattr(ffi.cast(f"struct {kind} *", ffi.cast("char *", head) + span.offset)[0], field, FAR)

    edited(plan, edit)
    refused(plan, "is damaged")


def put_text(head: Any, offset: int, text: bytes) -> None:
    """A string of the block, in the place of one that is as long."""
    ffi.memmove(ffi.cast("char *", head) + offset, text, len(text))


def test_a_plan_from_under_another_kernel_asks_for_a_new_compilation(plan: Path) -> None:
    edited(plan, lambda head: put_text(head, head.release, b"0"))
    refused(plan, "was compiled under another kernel; compile it again")


def test_a_plan_for_another_user_is_refused(plan: Path) -> None:
    edited(plan, lambda head: setattr(head, "uid", 12345))
    refused(plan, "was compiled for uid 12345")


@pytest.mark.skipif(not IS_ROOT, reason="the file is root's")
def test_a_file_that_gives_less_than_it_says_is_refused() -> None:
    plan = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not plan.exists() or plan.stat().st_mode & 0o022:
        pytest.skip("no such file here")
    refused(plan, "cannot be read")


@pytest.mark.parametrize("size", [0, 1, 100, 1000, -8, -1])
def test_a_file_that_is_cut_or_longer_is_refused(size: int, plan: Path) -> None:
    data = plan.read_bytes()
    plan.write_bytes(data[:size])
    assert alone(plan, "/bin/true").returncode == SETUP
    plan.write_bytes(data + bytes(8))
    refused(plan, "damaged")


def test_a_root_that_is_gone_asks_for_a_new_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))
    save(UNTRUSTED, tmp_path / "plan")
    assert alone(tmp_path / "plan", "/bin/true").returncode == 0
    shutil.rmtree(tmp_path / "cache" / "roots")
    refused(tmp_path / "plan", "compile it again")


def test_a_program_that_has_changed_asks_for_a_new_compilation(tmp_path: Path) -> None:
    program = tmp_path / "own"
    shutil.copy("/bin/true", program)
    save(UNTRUSTED, tmp_path / "plan", str(program))
    assert alone(tmp_path / "plan", str(program)).returncode == 0
    for change in (lambda: os.utime(program, (1, 1)), program.unlink):
        change()
        done = alone(tmp_path / "plan", str(program))
        assert done.returncode == SETUP and "has changed since; compile it again" in said(done)


@pytest.mark.elsewhere(COUNTED, why="this host lacks nothing")
def test_a_protection_that_this_host_lacks_is_refused_when_the_plan_is_made(tmp_path: Path) -> None:
    with pytest.raises(nsjail_py.Unavailable, match=r"cgroup|own_uid"):
        save(replace(UNTRUSTED, best_effort=()), tmp_path / "plan")
    assert not list(tmp_path.iterdir())
