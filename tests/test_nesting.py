"""User namespaces inside, where the policy allows them: what they are good for, and what still holds."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import IS_ROOT
from msgspec.structs import replace
from test_containers import NESTED

import nsjail_py
from nsjail_py import Jail, PolicyError, Result, Unavailable, launcher
from nsjail_py.compiled import Host, protections

BEGIN = """
import ctypes, errno, os, sys
USER, MOUNT, NET, UTS, CGROUP = 0x10000000, 0x00020000, 0x40000000, 0x04000000, 0x02000000
libc = ctypes.CDLL(None, use_errno=True)
def called(result): return 0 if result == 0 else ctypes.get_errno()
def unshare(flags): return called(libc.unshare(flags))
def mount(kind, where, data=None):
    return called(libc.mount(b"none", where.encode(), kind.encode(), 0, data and data.encode()))
def become_root():
    me, group = os.getuid(), os.getgid()
    assert unshare(USER | MOUNT) == 0
    for name, text in (("setgroups", "deny"), ("gid_map", f"0 {group} 1"), ("uid_map", f"0 {me} 1")):
        with open(f"/proc/self/{name}", "w") as file: file.write(text)
    assert os.getuid() == 0
"""


def run(program: str, **changes: Any) -> Result:
    return nsjail_py.run_python(BEGIN + program, policy="trusted", **(NESTED | {"proc": "pid"} | changes))


def test_a_program_becomes_root_of_namespaces_of_its_own() -> None:
    command = [
        "/usr/bin/unshare",
        "--map-root-user",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--mount-proc",
        "/bin/sh",
        "-c",
        "id -u; echo $$",
    ]
    assert nsjail_py.run(command, policy="trusted", proc="pid", **NESTED).check().stdout == b"0\n1\n"


def test_without_the_word_it_does_not() -> None:
    assert run("print(errno.errorcode[unshare(USER)])", nested_userns=False).check().stdout in (b"ENOSPC\n", b"EUSERS\n")


@pytest.mark.parametrize("kind", ["NET", "UTS"])
def test_their_number_is_bounded_however_they_are_kept(kind: str) -> None:
    program = f"""
become_root()
kept, error = 0, 0
while not error and kept < 400:
    error = unshare({kind})
    os.open("/proc/self/ns/{kind.lower()}", os.O_RDONLY)
    kept += not error
print(kept, errno.errorcode.get(error))
"""
    assert run(program).check().stdout == b"256 ENOSPC\n"


@pytest.mark.parametrize("own", [(), ("cgroup",)], ids=["in the caller's namespace of groups", "in its own"])
def test_no_limit_can_be_changed_from_them(own: tuple[str, ...]) -> None:
    """Not even where the program's user owns its control group: it cannot mount it."""
    program = """
become_root()
if error := unshare(CGROUP):
    print("refused", errno.errorcode[error])
    raise SystemExit
writable = 0
for number, (kind, data) in enumerate([("cgroup2", None), ("cgroup", "memory"), ("cgroup", "pids"), ("cgroup", "cpu,cpuacct")]):
    where = f"/tmp/{number}"
    os.mkdir(where)
    if mount(kind, where, data):
        continue
    for directory, _, names in os.walk(where):
        for name in names:
            try: open(f"{directory}/{name}", "r+").close()
            except OSError: continue
            writable += 1
        try: os.mkdir(f"{directory}/own")
        except OSError: continue
        writable += 1
print("writable", writable)
"""
    said = run(program, namespaces=("user", "mount", "pid", "ipc", *own)).check().stdout
    assert said == (b"writable 0\n" if IS_ROOT else b"refused ENOSPC\n")


@pytest.mark.skipif(launcher.current().claim.kind == "none", reason="without a control group it is refused")
def test_what_is_mounted_in_them_counts_as_memory() -> None:
    program = """
become_root()
assert mount("tmpfs", "/tmp", "size=1g") == 0
with open("/tmp/big", "wb") as file:
    for _ in range(200): file.write(bytes(1 << 20))
"""
    assert run(program, memory="100M").verdict == "memory"


def test_what_was_covered_stays_covered_and_read_only_stays_so() -> None:
    program = """
become_root()
print(called(libc.umount2(b"/proc/kcore", 0)) != 0, called(libc.umount2(b"/usr", 0)) != 0)
print(called(libc.mount(None, b"/usr", None, 0x1020, None)) != 0)
try: open("/usr/canary", "w")
except OSError as error: print(errno.errorcode[error.errno])
"""
    assert run(program, proc="masked").check().stdout == b"True True\nTrue\nEROFS\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "untrusted"}, r"nested_userns: .* needs landlock = false and no \[syscalls\]"),
        ({"policy": "trusted", "landlock": True}, r"nested_userns: .* needs landlock = false$"),
    ],
)
def test_what_would_refuse_a_jail_inside_is_not_asked_for_as_well(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        nsjail_py.run(["/bin/true"], nested_userns=True, **changes)


def test_there_is_no_warm_interpreter_with_them() -> None:
    with (
        Jail("trusted", nested_userns=True, memory=None, root="minimal", preload=[]) as jail,
        pytest.raises(PolicyError, match="nested_userns"),
    ):
        jail.run_python("1")


def test_where_nobody_counts_the_memory_of_what_is_mounted_it_is_an_error() -> None:
    host = Host.of(launcher.current().claim)._replace(cgroup="none", cgroup_reason="not ours")
    policy = replace(nsjail_py.policy("trusted"), nested_userns=True)
    with pytest.raises(Unavailable, match="nobody counts the memory of what the program mounts: not ours"):
        protections(policy, host)
    protections(replace(policy, limits=replace(policy.limits, memory=None)), host)
