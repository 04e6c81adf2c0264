"""A program's AppArmor profile or SELinux context, and our launcher's profile: really loaded, where this machine has one and we are root."""

from __future__ import annotations

import errno
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import IS_ROOT

import nsjail_py
from nsjail_py import Jail, Policy, PolicyError, Protection, SetupError, apparmor, label, launcher, selinux
from nsjail_py._native import ffi, lib
from nsjail_py.reports import Context, to_result

PARSER = shutil.which("apparmor_parser") is not None
DOCTOR = f"doctor: {label.lacks()['apparmor']}" if label.lacks()["apparmor"] else ""
LACK = (
    DOCTOR
    or ("" if IS_ROOT else "only root loads profiles")
    or ("" if PARSER else "apparmor_parser is not installed: apt install apparmor")
)


def under(module: str, lack: str) -> Callable[[Any], Any]:
    """Tests for hosts with this security module; skipped where something else for them is missing."""
    other = label.lacks()[module]

    def marked(test: Any) -> Any:
        return pytest.mark.elsewhere(bool(other), why=f"doctor: {other}")(pytest.mark.skipif(bool(lack), reason=lack)(test))

    return marked


real = under("apparmor", LACK)
needs_rule_userns = pytest.mark.elsewhere(not Path("/etc/apparmor.d/abi/4.0").exists(), why="AppArmor 3 knows no rule userns")
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
@pytest.mark.parametrize("mode", ["complain", pytest.param("unconfined", marks=needs_rule_userns)])
def test_a_profile_that_refuses_nothing_is_a_set_up_error(load: Callable[[str], None], mode: str) -> None:
    profile = apparmor.profile("sample")
    load(profile.replace("profile nsjail-payload flags=(", f"profile nsjail-payload flags=({mode},"))
    with pytest.raises(SetupError, match="aa-enforce") as raised:
        nsjail_py.run(["/bin/true"], apparmor="nsjail-payload")
    assert (raised.value.step, raised.value.errno) == ("label", errno.EOPNOTSUPP)


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
@needs_rule_userns
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


# ---------------------------------------------------------------- SELinux

NO_SELINUX = (
    (f"doctor: {label.lacks()['selinux']}" if label.lacks()["selinux"] else "")
    or ("" if IS_ROOT else "only root loads modules of policy")
    or ("" if shutil.which("semodule") else "semodule is not installed: apt install policycoreutils")
)
enforcing = under("selinux", NO_SELINUX)
CONTEXT = "print(open('/proc/self/attr/current').read().strip('\\0\\n'))"
FORBIDDEN = """\
(typeattribute nsjail_test)
(type nsjail_test_nnp_t)
(type nsjail_test_entrypoint_t)
(typeattributeset nsjail_test (nsjail_test_nnp_t nsjail_test_entrypoint_t))
(typeattributeset domain (nsjail_test))
(roletype system_r nsjail_test)
(roletype unconfined_r nsjail_test)
(allow unconfined_domain_type nsjail_test (process (transition)))
(allow unconfined_domain_type nsjail_test_entrypoint_t (process2 (nnp_transition nosuid_transition)))
(allow nsjail_test_nnp_t file_type (file (entrypoint)))
"""
"""Two domains that may be entered: but not under no_new_privs, and by no program."""


def context(domain: str) -> str:
    user, role, _ = Path("/proc/self/attr/current").read_text().split(":", 2)
    return f"{user}:{role}:{domain}:s0"


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The context of the sample's domain; building the host's policy anew takes seconds, and minutes where it is emulated."""
    modules = {"nsjail_payload": selinux.SAMPLE, "nsjail_test": FORBIDDEN}
    files = [tmp_path_factory.mktemp("modules") / f"{name}.cil" for name in modules]
    for file, text in zip(files, modules.values(), strict=True):
        file.write_text(text)
    subprocess.run(["semodule", "--install", *files], check=True)
    yield context("nsjail_payload_t")
    subprocess.run(["semodule", "--remove", *modules], check=True)


@enforcing
def test_the_program_has_the_context_of_its_policy(payload: str) -> None:
    result = nsjail_py.run_python(CONTEXT, selinux=payload).check()
    assert result.stdout.decode() == f"{payload}\n"
    assert {one.name: one.state for one in result.protections}["selinux"] == "applied"
    assert payload.encode() not in nsjail_py.run_python(CONTEXT).check().stdout
    assert nsjail_py.run(["/bin/true"], selinux=payload, proc="none").ok


@enforcing
def test_the_domain_refuses_what_the_jail_alone_would_let_pass(payload: str) -> None:
    copied = ["/bin/sh", "-c", "cat /bin/true >/work/true; chmod +x /work/true; /work/true"]
    alone = nsjail_py.run(copied, policy="moderate", root="system", exec_in_writable=True)
    assert alone.ok
    assert nsjail_py.run(copied, policy="moderate", root="system", exec_in_writable=True, selinux=payload).exit_code == 126


@enforcing
def test_a_job_of_a_stocked_jail_has_the_context_too(payload: str) -> None:
    with Jail("untrusted", selinux=payload, stock=2) as jail:
        for _ in range(5):
            assert jail.run_python(CONTEXT).check().stdout.decode() == f"{payload}\n"


@enforcing
def test_a_program_in_the_samples_domain_writes_where_the_policy_lets_it_and_starts_others(payload: str) -> None:
    work = "import os, subprocess; open('/work/a', 'w').write('a'); os.mkdir('/tmp/b'); os.symlink('a', '/tmp/b/c'); os.remove('/work/a')"
    started = "; print(subprocess.run(['/bin/cat'], input=b'it ran', capture_output=True).stdout)"
    result = nsjail_py.run_python(work + started, policy="moderate", root="system", selinux=payload)
    assert (result.stdout, result.stderr) == (b"b'it ran'\n", b"")


@enforcing
def test_a_context_that_the_host_does_not_know_is_a_set_up_error() -> None:
    for unknown in (context("nsjail_nonesuch_t"), context("etc_t"), "no_context"):
        with pytest.raises(SetupError, match="SELinux knows no such context") as raised:
            nsjail_py.run(["/bin/true"], selinux=unknown)
        assert (raised.value.step, raised.value.errno) == ("label", errno.EINVAL)


@enforcing
def test_a_context_that_the_caller_may_not_give_is_a_set_up_error_with_the_missing_permission(payload: str) -> None:
    with pytest.raises(SetupError, match="entrypoint") as raised:
        nsjail_py.run(["/bin/true"], selinux=context("nsjail_test_entrypoint_t"))
    assert (raised.value.step, raised.value.errno) == ("label", errno.EACCES)
    with pytest.raises(SetupError, match="nnp_transition") as raised:
        nsjail_py.run(["/bin/true"], selinux=context("nsjail_test_nnp_t"))
    assert (raised.value.step, raised.value.errno) == ("label", errno.EPERM)


@enforcing
@pytest.mark.skipif(not USER, reason=NO_SELINUX or "nobody has an account here to run it")
def test_an_ordinary_users_program_has_the_context_too(payload: str) -> None:
    code = f"import nsjail_py; print(nsjail_py.run_python({CONTEXT!r}, selinux={payload!r}).stdout.decode())"
    assert as_user(code).strip() == payload


@enforcing
def test_a_permissive_kernel_is_reported_and_gives_no_context() -> None:
    code = "import nsjail_py; from nsjail_py import cli; cli.main(['doctor']); nsjail_py.run(['/bin/true'], selinux='some-context')"
    label.SELINUX.write_text("0")
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    finally:
        label.SELINUX.write_text("1")
    assert "note  labels" in done.stdout and "SELinux is permissive" in done.stdout
    assert "Unavailable" in done.stderr and "selinux: SELinux is permissive" in done.stderr


def test_the_commands_print_the_samples(cli: list[str]) -> None:
    for command, text in (("apparmor", apparmor.SAMPLE), ("selinux", selinux.SAMPLE)):
        assert subprocess.run([*cli, command, "sample"], capture_output=True, text=True, check=True).stdout == text


# ---------------------------------------------------------------- both


needs_parser = pytest.mark.skipif(not PARSER, reason=DOCTOR or "apparmor_parser is not installed: apt install apparmor")


@needs_parser
@pytest.mark.parametrize("name", [pytest.param("launcher", marks=needs_rule_userns), "sample"])
def test_apparmors_parser_takes_our_profiles(name: str, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text(apparmor.profile(name))
    subprocess.run(["apparmor_parser", "--skip-kernel-load", "--skip-cache", tmp_path / "profile"], check=True)


def test_the_launchers_profile_names_the_launcher() -> None:
    assert f'"{launcher.PROGRAM.resolve()}"' in apparmor.profile("launcher")


ODD = '/srv/* ?/[a]/{b,c}/^"@{HOME}$x#/d\\/nsjail-launcher'


def test_the_launchers_profile_is_for_its_path_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "PROGRAM", Path(ODD))
    written = r'"/srv/\* \?/\[a\]/\{b,c\}/\^\"\@\{HOME\}$x#/d\\/nsjail-launcher"'
    assert f"\nprofile nsjail-launcher {written} flags=(unconfined) {{\n" in apparmor.profile("launcher")


@needs_parser
@needs_rule_userns
def test_apparmors_parser_takes_the_launchers_path_whatever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apparmor, "PROGRAM", Path(ODD))
    (tmp_path / "profile").write_text(apparmor.profile("launcher"))
    subprocess.run(["apparmor_parser", "--skip-kernel-load", "--skip-cache", tmp_path / "profile"], check=True)


@pytest.mark.parametrize("letter", ["\n", "\t", "\x7f", "\udcff"], ids=ascii)
def test_a_path_that_no_profile_can_name_is_an_error(letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "PROGRAM", Path(f"/srv/a{letter}b/nsjail-launcher"))
    with pytest.raises(PolicyError, match="no path with control characters"):
        apparmor.profile("launcher")


@pytest.mark.parametrize("state", ["applied", "unavailable"])
def test_an_exec_that_is_refused_is_the_labels_fault_only_where_one_was_given(state: Literal["applied", "unavailable"]) -> None:
    report = ffi.new("struct report *", {"kind": lib.REPORT_FAILED, "step": lib.STEP_EXEC, "error": errno.EACCES})
    context = Context(Policy(), "root", (), (Protection("selinux", state),))
    if state == "applied":
        with pytest.raises(SetupError, match="nosuid_transition") as raised:
            to_result(report, context)
        assert raised.value.step == "label"
    else:
        assert to_result(report, context).verdict == "exec_failed"


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
