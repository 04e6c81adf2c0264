"""Container engines' seccomp profiles as policies."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import nsjail_py
from nsjail_py import oci_seccomp, policyfile, syscalls

PROFILE = ROOT / "tests" / "container_seccomp.json"


def test_a_container_engine_s_profile_becomes_a_policy_that_runs_programs(cli: list[str], tmp_path: Path) -> None:
    text = str(oci_seccomp.load(PROFILE))
    (tmp_path / "p.toml").write_text(f'extends = "moderate"\n{text}')
    assert policyfile.check(tmp_path / "p.toml") == []
    result = nsjail_py.run_python("import subprocess; print(6*7)\nsubprocess.run(['/bin/true'])", policy=tmp_path / "p.toml", root="system")
    assert result.ok and result.denied == {}, result
    done = subprocess.run([*cli, "seccomp", str(PROFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == text


def test_the_policy_never_allows_more_than_the_profile() -> None:
    profile = json.loads(PROFILE.read_text())
    named = {
        name
        for rule in profile["syscalls"]
        for name in rule["names"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "caps" not in rule.get("includes", {})
    }
    found = oci_seccomp.load(PROFILE).syscalls
    assert set(syscalls.calls_of(found)) <= named
    assert not set(syscalls.calls_of(found)) & {"mount", "bpf", "clone3", "ptrace", "reboot"}
    assert len(syscalls.calls_of(found)) > 200


@pytest.mark.parametrize(
    ("rule", "entry", "there"),
    [
        ({"names": ["socket", "bind", "connect", "listen", "accept", "accept4"]}, "@inet-sockets", False),  # without what the set brings along
        ({"names": ["mkdir"]}, "mkdir", True),
        ({"names": ["mkdir"], "includes": {"caps": ["CAP_SYS_ADMIN"]}}, "mkdir", False),
        ({"names": ["mkdir"], "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]}, "mkdir", False),
        ({"names": ["clone", "sched_getaffinity"]}, "@threads", True),
        ({"names": ["clone", "sched_getaffinity"], "args": [{"index": 0, "value": 5, "op": "SCMP_CMP_EQ"}]}, "@threads", False),
        ({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}, "mkdir", False),
    ],
)  # fmt: skip
def test_conditions_of_a_profile_make_the_policy_narrower_and_never_wider(rule: dict[str, object], entry: str, there: bool) -> None:
    rule = {"action": "SCMP_ACT_ALLOW", **rule}
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}
    assert (entry in oci_seccomp.read(json.dumps(profile).encode()).syscalls.allow) is there


@pytest.mark.parametrize(
    ("rule", "there"),
    [
        ({}, True),
        ({"args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}, False),
        ({"excludes": {"minKernel": "5.0"}}, False),
        ({"includes": {"minKernel": "4.8"}}, True),
        ({"includes": {"minKernel": "6.99"}}, False),
        ({"includes": {"minKernel": "x"}}, False),
    ],
)  # fmt: skip
def test_what_a_profile_allows_for_some_arguments_or_kernels_is_not_allowed_for_all(rule: dict[str, object], there: bool) -> None:
    rule = {"action": "SCMP_ACT_ALLOW", "names": ["execve", "mkdir"], **rule}
    found = oci_seccomp.read(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}).encode()).syscalls
    assert (found.exec, "mkdir" in found.allow) == (there, there)


@pytest.mark.parametrize("which", ["includes", "excludes"])
def test_what_a_profile_denies_on_some_kernels_is_denied_on_all(which: str) -> None:
    rules = [
        {"action": "SCMP_ACT_ALLOW", "names": ["mkdir"]},
        {"action": "SCMP_ACT_ERRNO", "names": ["mkdir"], which: {"minKernel": "6.99"}},
    ]
    assert oci_seccomp.read(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}).encode()).syscalls.allow == ()


def test_what_the_policy_allows_beyond_the_profile_is_said() -> None:
    essential = syscalls.alternatives("@essential")
    rules = [{"action": "SCMP_ACT_ALLOW", "names": sorted(essential.keys() - {"brk"})}]
    rules += [{"action": "SCMP_ACT_ERRNO", "names": ["mprotect"]}]
    rules += [{"action": "SCMP_ACT_ALLOW", "names": ["brk"], "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]}]
    found = oci_seccomp.read(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}).encode())
    assert {note.partition(":")[0] for note in found.notes if "beyond the profile" in note} == {"brk", "mprotect"}
    assert set(syscalls.calls_of(found.syscalls)) == set(essential)
    assert "# mprotect: allowed beyond the profile" in str(found)
    assert not any("beyond the profile" in note for note in oci_seccomp.load(PROFILE).notes)


def test_no_name_in_a_profile_adds_a_line_to_the_policy() -> None:
    name = "q\nextends = 'untrusted'\nmounts = [{source = '/etc', target = '/e'}]\n#\r\x1b"
    for args in ([], [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]):
        profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": [name], "action": "SCMP_ACT_ALLOW", "args": args}]}
        said = str(oci_seccomp.read(json.dumps(profile).encode()))
        assert tomllib.loads(said) == {"syscalls": {"exec": False, "on_denied": "errno", "allow": []}}
        assert all(line.isprintable() for line in said.split("\n"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"defaultAction": "SCMP_ACT_ALLOW"}',
        b'{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"action": "X"}]}',
        b"[" * 100000,
    ],
)
def test_what_is_no_allow_list_is_refused(data: bytes) -> None:
    with pytest.raises(nsjail_py.PolicyError):
        oci_seccomp.read(data)
