"""Hosts that withhold a system call or a directory, as containers and systemd units do: the error names it, and what gives it back."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import IS_ROOT, ROOT

from nsjail_py import SetupError, cachedir
from nsjail_py.launcher import PROGRAM

MOUNTS = ("fsopen", "fsconfig", "fsmount", "mount", "mount_setattr", "move_mount", "open_tree", "pivot_root", "umount2")
"""systemd's @mount, which @system-service leaves out."""
UNDER = """
import ctypes, sys
import pyseccomp
action, *names = sys.argv[1:]
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for name in names:
    filter.add_rule(pyseccomp.KILL_PROCESS if action == "kill" else pyseccomp.ERRNO(int(action)), name)
filter.load()
import nsjail_py
from nsjail_py import doctor
try:
    print(nsjail_py.run(["/bin/true"]).summary)
except nsjail_py.JailError as error:
    print(error)
for finding in doctor.report().findings:
    print(finding.state, finding.name, finding.text, finding.remedy)
"""


def told(action: str | int, *names: str) -> str:
    """What a process says that has such a filter on it: the error of a run, and doctor's findings."""
    done = subprocess.run([sys.executable, "-c", UNDER, str(action), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_filter_that_kills_whoever_mounts_is_named_and_kills_nobody_but_the_jail() -> None:
    said = told("kill", *MOUNTS)
    assert "lost: Operation not permitted; a system call filter killed it (systemd unit" in said
    assert "SystemCallFilter= as `nsjail-py systemd unit` has it" in said.splitlines()[0]
    for name in ("open_tree", "fsopen", "mount_setattr"):
        assert f"lack {name} {name} is refused by a system call filter, which kills" in said


@pytest.mark.parametrize(
    ("name", "error", "step", "setting"),
    [
        ("clone3", errno.ENOSYS, "clone", "RestrictNamespaces=no"),
        ("sethostname", errno.EPERM, "hostname", "ProtectHostname=no"),
        ("unshare", errno.EPERM, "namespaces", "RestrictNamespaces=no"),
        ("personality", errno.EPERM, "personality", "Personality="),
        ("getpriority", errno.EPERM, "priority", "what the caller has"),
    ],
)
def test_a_withheld_call_is_the_step_that_failed_with_the_setting_that_withholds_it(name: str, error: int, step: str, setting: str) -> None:
    first, *_ = told(error, name).splitlines()
    assert first.startswith(f"{step}: ")
    assert setting in first


def test_a_filter_that_kills_whoever_asks_for_one_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))  # a filter that was compiled before would not be asked for
    assert told("kill", "seccomp").startswith("seccomp (a system call filter kills whoever asks for one of his own); ")


@pytest.mark.parametrize("action", ["kill", errno.EPERM])
def test_landlock_that_a_filter_refuses_is_missing_by_its_doing(action: str | int) -> None:
    said = told(action, "landlock_create_ruleset")
    assert said.startswith("landlock (a system call filter refuses it); ")
    assert "lack landlock a system call filter refuses it" in said.lower()


CLOCK = """
import sys
import nsjail_py
from nsjail_py import launcher
launcher.PROGRAM = sys.argv[1]
result = nsjail_py.run(["/bin/true"], wall_time=60.0, syscalls={"allow": ["@files", "@identity"]})
print(result.verdict, result.denied, result.wall_time < 60)
"""


def test_a_clock_that_needs_a_system_call_is_read_past_the_program_s_filter(tmp_path: Path) -> None:
    """acpi_pm, hpet and xen: the clock starts all the same, and the program is charged with nothing that it has not done."""
    script = tmp_path / "launcher"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {ROOT / 'tests/without_vdso.py'} {PROGRAM}\n")
    script.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", CLOCK, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("ok {} True\n", "")


@pytest.mark.skipif(not IS_ROOT, reason="only root has ids of its own to give")
def test_root_without_the_host_ids_of_its_jails_is_told_so() -> None:
    """PrivateUsers= of a systemd unit, and rootless containers."""
    code = "import nsjail_py; from nsjail_py import cli; cli.main(['doctor']); nsjail_py.run(['/bin/true'])"
    done = subprocess.run(["unshare", "--user", "--map-root-user", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "LACK  user ids" in done.stdout
    assert "uid pool (root in a user namespace without the ids from 1899999999 on); in a systemd unit PrivateUsers=no" in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="only root locks its ids below /run")
def test_a_run_that_cannot_be_written_names_the_directory_and_the_setting() -> None:
    """ProtectSystem=strict."""
    code = "import nsjail_py; nsjail_py.run(['/bin/true'])"
    script = 'mount --bind /run /run && mount -o remount,ro,bind /run && exec "$0" -c "$1"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script, sys.executable, code], capture_output=True, text=True, check=False)
    assert "uid pool: Read-only file system (/run/nsjail_py" in done.stderr
    assert "RuntimeDirectory=nsjail_py" in done.stderr


@pytest.mark.elsewhere(IS_ROOT, why="root may enter every directory")
def test_a_home_that_cannot_be_entered_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ProtectHome=."""
    for name in ("NSJAIL_PY_CACHE", "CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "user"))
    (tmp_path / "home").mkdir(mode=0)
    with pytest.raises(SetupError, match="CacheDirectory=nsjail_py"):
        cachedir.directory("roots")


def test_the_cache_of_a_unit_is_where_systemd_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSJAIL_PY_CACHE", raising=False)
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path}/one:{tmp_path}/two")
    assert cachedir.directory("roots") == tmp_path / "one" / "nsjail_py" / "roots"
