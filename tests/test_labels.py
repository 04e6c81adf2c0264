"""A program's AppArmor profile, and our launcher's: really loaded, where this machine has AppArmor and we are root."""

from __future__ import annotations

import errno
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT

import nsjail_py
from nsjail_py import Jail, PolicyError, SetupError, apparmor, label, launcher

PARSER = shutil.which("apparmor_parser") is not None
DOCTOR = f"doctor: {label.lacks()['apparmor']}" if label.lacks()["apparmor"] else ""
LACK = (
    DOCTOR
    or ("" if IS_ROOT else "only root loads profiles")
    or ("" if PARSER else "apparmor_parser is not installed: apt install apparmor")
)
real = pytest.mark.skipif(bool(LACK), reason=LACK)
ABI_4 = Path("/etc/apparmor.d/abi/4.0")
USER = next((entry.pw_name for entry in pwd.getpwall() if 1000 <= entry.pw_uid < 60000), "")
ASK = "print(open('/proc/self/attr/apparmor/current').read().strip())"
UBUNTU = """\
abi <abi/4.0>,
include <tunables/global>
profile nsjail-test-ubuntu flags=(attach_disconnected) {
  /** rwmlkpix,
  / rw,
  userns,
  audit deny capability,
  network,
  unix,
  signal,
  ptrace,
  mount,
  umount,
  pivot_root,
  dbus,
}
"""
"""What Ubuntu's restriction does: the namespace is made and holds no right."""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    loaded: list[Path] = []

    def load(text: str) -> None:
        file = tmp_path / f"profile-{len(loaded)}"
        file.write_text(text)
        subprocess.run(["apparmor_parser", "--replace", "--skip-cache", file], check=True)
        loaded.append(file)

    yield load
    for file in loaded:
        subprocess.run(["apparmor_parser", "--remove", file], check=True)


@real
def test_the_program_has_the_profile_of_its_policy(load: Callable[[str], None]) -> None:
    load(apparmor.profile("sample"))
    result = nsjail_py.run_python(ASK, apparmor="nsjail-payload").check()
    assert result.stdout == b"nsjail-payload (enforce)\n"
    assert {one.name: one.state for one in result.protections}["apparmor"] == "applied"
    assert b"unconfined" in nsjail_py.run_python(ASK).check().stdout
    assert nsjail_py.run(["/bin/true"], apparmor="nsjail-payload", proc="none").ok


@real
def test_the_profile_refuses_what_the_jail_alone_would_let_pass(load: Callable[[str], None]) -> None:
    load(apparmor.profile("sample"))
    copied = ["/bin/sh", "-c", "cat /bin/true >/work/true; chmod +x /work/true; /work/true"]
    alone = nsjail_py.run(copied, policy="moderate", root="system", exec_in_writable=True)
    assert alone.ok
    assert nsjail_py.run(copied, policy="moderate", root="system", exec_in_writable=True, apparmor="nsjail-payload").exit_code == 126


@real
def test_a_job_of_a_stocked_jail_has_it_too(load: Callable[[str], None]) -> None:
    load(apparmor.profile("sample"))
    with Jail("untrusted", apparmor="nsjail-payload", stock=2) as jail:
        for _ in range(5):
            assert jail.run_python(ASK).check().stdout == b"nsjail-payload (enforce)\n"


@real
def test_a_profile_that_is_not_loaded_is_a_set_up_error() -> None:
    with pytest.raises(SetupError, match="apparmor_parser -r") as raised:
        nsjail_py.run(["/bin/true"], apparmor="nsjail-nonesuch")
    assert (raised.value.step, raised.value.errno) == ("label", errno.ENOENT)


def as_user(code: str, *before: str) -> str:
    user = pwd.getpwnam(USER)
    command = [
        "setpriv",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--init-groups",
        "--reset-env",
        *before,
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@real
@pytest.mark.skipif(not USER, reason=LACK or "nobody has an account here to run it")
def test_an_ordinary_users_program_has_it_too(load: Callable[[str], None]) -> None:
    load(apparmor.profile("sample"))
    code = f"import nsjail_py; print(nsjail_py.run_python({ASK!r}, apparmor='nsjail-payload').stdout)"
    assert "nsjail-payload" in as_user(code)


@real
@pytest.mark.skipif(not USER, reason=LACK or "nobody has an account here to run it")
@pytest.mark.skipif(not ABI_4.exists(), reason=LACK or "AppArmor 3 knows no rule userns")
def test_ubuntus_restriction_is_named_and_our_profile_lifts_it(load: Callable[[str], None]) -> None:
    code = "from nsjail_py import cli; cli.main(['doctor']); cli.main(['exec', '--', '/bin/echo', 'it ran'])"
    load(UBUNTU)
    confined = ("aa-exec", "-p", "nsjail-test-ubuntu", "--")
    said = as_user(code, *confined)
    assert "LACK  rights in a user namespace" in said
    assert "it ran" not in said
    load(apparmor.profile("launcher"))
    said = as_user(code, *confined)
    assert "it ran" in said
    assert "refused to this process, but not to the launcher" in " ".join(said.split())


@pytest.mark.skipif(not PARSER, reason=DOCTOR or "apparmor_parser is not installed: apt install apparmor")
@pytest.mark.parametrize("name", ["launcher", "sample"])
def test_apparmors_parser_takes_our_profiles(name: str, tmp_path: Path) -> None:
    if name == "launcher" and not ABI_4.exists():
        pytest.skip("this AppArmor knows no rule userns")
    (tmp_path / "profile").write_text(apparmor.profile(name))
    subprocess.run(["apparmor_parser", "--skip-kernel-load", "--skip-cache", tmp_path / "profile"], check=True)


def test_the_launchers_profile_names_the_launcher() -> None:
    assert f'"{launcher.PROGRAM.resolve()}"' in apparmor.profile("launcher")


def test_a_label_that_the_host_cannot_give_is_an_error_unless_the_policy_does_without() -> None:
    name = next((name for name, why in label.lacks().items() if why), None)
    assert name, "a kernel has one of them at most"
    with pytest.raises(SetupError, match=name):
        nsjail_py.run(["/bin/true"], **{name: "some-label"})
    best_effort = (*nsjail_py.policy("untrusted").best_effort, name)
    result = nsjail_py.run(["/bin/true"], **{name: "some-label"}, best_effort=best_effort).check()
    assert {one.name: one.state for one in result.protections}[name] == "unavailable"


@pytest.mark.parametrize("changes", [{"apparmor": "two words"}, {"selinux": ""}, {"apparmor": "a\nb"}])
def test_a_label_that_makes_no_sense_is_a_policy_error(changes: dict[str, str]) -> None:
    with pytest.raises(PolicyError):
        Jail(**changes)


def test_a_warm_interpreter_takes_no_label() -> None:
    with pytest.raises(PolicyError, match="preload"):
        Jail(apparmor="nsjail-payload", preload=[])
