"""Every system call by its number, in each of the three tables that this kernel has, against the policy's own list.

The kernel itself is asked here; tests/test_syscalls.py asks the bytes of the filter.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import PATIENCE
from msgspec.structs import replace

import nsjail_py
from nsjail_py import Jail, Policy, PolicyError, Verdict, syscalls

from .runner import WALLS, Attack, fails

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="doctor: the filter's tables here are those of x86-64")

LAST = 520
ALL_ONES = 2**64 - 1
HIGH = 0xDEADBEEF << 32
UNFIT = {"exit", "exit_group", "fork", "vfork", "rt_sigreturn", "pause", "uretprobe", "uprobe"}
"""See syscalls.c."""
KERNELS_EPERM = {"setsid", "setpgid", "fchmod", "fchown"}
"""What the kernel itself refuses with EPERM: to a process that leads its session, and of a null device that is root's."""


def with_fork(policy: Policy) -> Policy:
    """For children that die of one call each. The filter's head, which looks at the table, is the same."""
    assert policy.syscalls
    allowed = (*policy.syscalls.allow, "@processes") if "@processes" not in policy.syscalls.allow else policy.syscalls.allow
    return replace(policy, syscalls=replace(policy.syscalls, allow=allowed))


def expected(policy: Policy, number: int, arguments: tuple[int, ...]) -> str:
    """allow, EPERM or ENOSYS: from the policy's rules, not from the filter."""
    assert policy.syscalls
    name, rules = syscalls.name_of(number), syscalls._rules(policy.syscalls)
    newer = number >= syscalls._unknown_from(syscalls._library())
    if name in ("clone3", "openat2") or newer:
        return "ENOSYS"
    alternatives = rules.get(name, ())
    return "allow" if any(all(arguments[a] & mask == value for a, mask, value in one) for one in alternatives) else "EPERM"


def table(output: bytes) -> dict[int, int]:
    return {int(number): int(answer) for number, answer in (line.split() for line in output.decode().splitlines())}


def jailed(programs: Path, policy: Policy, *args: object) -> nsjail_py.Result:
    return Jail(policy).run([str(programs / "syscalls"), *map(str, args)], timeout=30 * PATIENCE)


def unjailed(programs: Path, *args: object) -> bytes:
    return subprocess.run([str(programs / "syscalls"), *map(str, args)], capture_output=True, check=False, timeout=30 * PATIENCE).stdout


@pytest.mark.parametrize("argument", [ALL_ONES, HIGH], ids=["all bits set", "high bits set"])
@pytest.mark.parametrize("wall", ["untrusted", "moderate", "filter-only"])
def test_every_number_is_answered_as_the_policy_says(wall: str, argument: int, programs: Path) -> None:
    """With bad pointers: what the filter lets through, the kernel refuses for another reason or for none."""
    policy = WALLS[wall]
    skip = {number for number in range(LAST) if argument == HIGH and syscalls.name_of(number) in WAITS}
    found: dict[int, int] = {}
    for first, last in runs(skip):
        result = jailed(programs, policy, "sweep", first, last, argument)
        assert result.ok, result.summary
        found |= table(result.stdout)
    assert len(found) > LAST - len(UNFIT) - len(WAITS) - 1
    wrong = {}
    for number, answer in found.items():
        want = expected(policy, number, (argument,) * 6)
        name = syscalls.name_of(number)
        # ENOSYS where EPERM was meant is the kernel's never: the filter answers first.
        good = {"allow": answer != errno.EPERM or name in KERNELS_EPERM, "EPERM": answer == errno.EPERM, "ENOSYS": answer == errno.ENOSYS}
        if not good[want]:
            wrong[name] = (want, answer)
    assert not wrong


# With zeros in the low halves of their arguments these wait for ever, or end the program's input, output or memory.
WAITS = {
    "select",
    "pselect6",
    "poll",
    "ppoll",
    "rt_sigsuspend",
    "close_range",
    "close",
    "futex",
    "read",
    "rt_sigtimedwait",
    "kill",
    "wait4",
    "setsid",
}


def runs(skip: set[int]) -> list[tuple[int, int]]:
    """The numbers in stretches without those to be skipped."""
    stretches, first = [], 0
    for number in [*sorted(skip), LAST]:
        if first < number:
            stretches.append((first, number - 1))
        first = number + 1
    return stretches


@pytest.mark.parametrize("wall", ["untrusted", "moderate"])
@pytest.mark.parametrize(("name", "last"), [("x32", 600), ("i386", 470)])
def test_no_call_of_another_table_is_survived(name: str, last: int, wall: str, programs: Path) -> None:
    outside = table(unjailed(programs, "foreign", name, 19, 21))
    assert set(outside.values()) == {0}, "outside it is no crime to ask"
    policy = with_fork(WALLS[wall])
    result = jailed(programs, policy, "foreign", name, 0, last)
    assert result.ok, (result.summary, result.stderr)
    answers = table(result.stdout)
    assert len(answers) == last + 1
    assert set(answers.values()) == {signal.SIGSYS}


@pytest.mark.parametrize("wall", ["untrusted", "no-landlock", "filter-only"])
@pytest.mark.parametrize("name", ["x32", "i386"])
def test_a_call_of_another_table_ends_the_run_and_is_named(name: str, wall: str, programs: Path) -> None:
    for number in (1, 4, 11, 20, 39, 59, 101, 272, 425):
        result = jailed(programs, WALLS[wall], "one", name, number)
        assert result.verdict is Verdict.syscall and result.signal == signal.SIGSYS, (number, result.summary)


ELF32 = "path = f'/tmp/elf32-{os.getpid()}'\nopen(path, 'wb').write(bytes.fromhex(T['program']))\nos.chmod(path, 0o755)\ncode = os.spawnv(os.P_WAIT, path, [path])\nos.unlink(path)\nif code == 0: won()"


def test_a_program_for_32_bits_says_nothing(programs: Path) -> None:
    """It is killed at its first call, be it written by the program itself or started by us."""
    attack, target = Attack("", ELF32), {"program": (programs / "elf32").read_bytes().hex()}
    result = fails(attack, "moderate", target)
    assert b"DONE" in result.stdout  # it was executed
    shown = replace(WALLS["filter-only"], mounts=(nsjail_py.Mount(source=str(programs), target="/opt/canary"),), root="system")
    assert Jail(replace(shown, syscalls=None)).run([str(programs / "elf32")]).stdout == b"WON\n"
    result = Jail(shown).run([str(programs / "elf32")])
    assert result.stdout == b"" and result.signal == signal.SIGSYS
    with pytest.raises(PolicyError):
        Jail("untrusted").run([str(programs / "elf32")])


def test_the_filter_is_on_every_thread_and_no_two_threads_exec(programs: Path) -> None:
    """The one exec that is let through is not to be won by a race."""
    won = any(unjailed(programs, "threads").endswith(b"0\n") for _ in range(5))  # now and then two end each other
    assert won, "outside one of them wins, and prints that its call returned"
    for wall in ("untrusted", "no-landlock"):
        result = jailed(programs, WALLS[wall], "threads").check()
        assert result.stdout.split(b"\n")[:-1] == [b"1 1"] * 8
        assert result.denied == {"ptrace": 8, "execve": 8}


# Arguments: (number, arguments) that work outside and must not inside, each with garbage above its 32 bits.

NEWUSER, NEWNET, NEWNS = 0x10000000, 0x40000000, 0x00020000
TRICKS = {
    "typing into a terminal": ("ioctl", (0, 0x5412, 0)),
    "selecting on a console": ("ioctl", (0, 0x541C, 0)),
    "an ioctl of a driver": ("ioctl", (0, 0x4B3A, 0)),
    "a netlink socket": ("socket", (16, 3, 0)),
    "a raw socket": ("socket", (2, 3, 1)),
    "a packet socket": ("socket", (17, 3, 0)),
    "a vsock": ("socket", (40, 1, 0)),
    "an inet socket pair": ("socketpair", (2, 1, 0, 0)),
    "a new user namespace": ("clone", (NEWUSER | 17, 0, 0, 0, 0)),
    "a new network": ("clone", (NEWNET | 17, 0, 0, 0, 0)),
    "a new mount namespace": ("clone", (NEWNS | 17, 0, 0, 0, 0)),
    "a traced child": ("clone", (0x2000 | 17, 0, 0, 0, 0)),
    "no randomised addresses": ("personality", (0x0040000,)),
    "reading is executing": ("personality", (0x0400000,)),
    "an own filter by prctl": ("prctl", (22, 1, 0, 0, 0)),
    "a tracer": ("prctl", (0x59616D61, 1, 0, 0, 0)),
    "securebits": ("prctl", (28, 0, 0, 0, 0)),
    "capabilities across a change of user": ("prctl", (8, 1, 0, 0, 0)),
    "its own memory map": ("prctl", (35, 1, 0, 0, 0)),
    "speculation": ("prctl", (53, 0, 0, 0, 0)),
    "limits of others": ("prlimit64", (1, 7, 0, 0)),
    "a block device": ("mknod", (0, 0o060666, 0)),
    "a character device": ("mknodat", (-100, 0, 0o020666, 0)),
    "a set-user-id mode": ("chmod", (0, 0o4755)),
    "a set-group-id mode": ("fchmodat", (-100, 0, 0o2755)),
    "a set-user-id mode by descriptor": ("fchmod", (0, 0o4755)),
    "a new set-user-id file": ("open", (0, 0o100, 0o4755)),
    "a new set-user-id file at": ("openat", (-100, 0, 0o100, 0o6755)),
    "a created set-user-id file": ("creat", (0, 0o4755)),
    "huge pages": ("mmap", (0, 1 << 21, 3, 0x40022, 0, 0)),
    "a huge file in memory": ("memfd_create", (0, 4)),
    "huge shared memory": ("shmget", (0, 1 << 21, 0o5600)),
    "a lease on a file": ("fcntl", (0, 1024, 1)),
    "news of a directory": ("fcntl", (0, 1026, 1)),
    "larger buffers": ("setsockopt", (0, 1, 7, 0, 0)),
    "larger buffers by force": ("setsockopt", (0, 1, 33, 0, 0)),
    "a program for a socket": ("setsockopt", (0, 1, 26, 0, 0)),
    "a device for a socket": ("setsockopt", (0, 1, 25, 0, 0)),
    "a set-user-id node": ("mknod", (0, 0o104755, 0)),
}  # fmt: skip


@pytest.mark.parametrize("wall", ["untrusted", "moderate", "filter-only"])
def test_high_bits_hide_no_argument(wall: str, programs: Path) -> None:
    """The kernel cuts int arguments to 32 bits: a comparison of 64 would let these through. Bad pointers: EFAULT is let through."""
    import ctypes

    numbers = {name: syscalls._number(name) for name, _ in TRICKS.values()}
    wrong = {}
    for what, (name, arguments) in TRICKS.items():
        for high in (0, HIGH, 1 << 32, 1 << 63):
            sent = [str(ctypes.c_uint32(argument).value | high) for argument in arguments] + ["0"] * (6 - len(arguments))
            answer = int(jailed(programs, WALLS[wall], "call", numbers[name], *sent).stdout)
            if answer != errno.EPERM:
                wrong[what, hex(high)] = errno.errorcode.get(answer, answer)
    assert not wrong


def test_the_tricks_are_no_crime_outside(programs: Path) -> None:
    """Else EPERM inside would prove nothing. Only those that do nothing: clones and locks stay out of it."""
    for what in (
        "a raw socket",
        "a netlink socket",
        "an inet socket pair",
        "a set-user-id mode",
        "no randomised addresses",
        "a new set-user-id file",
        "a huge file in memory",
    ):
        name, arguments = TRICKS[what]
        answer = int(unjailed(programs, "call", syscalls._number(name), *[a & ALL_ONES for a in arguments], *[0] * (6 - len(arguments))))
        assert answer != errno.EPERM or os.geteuid(), what


def test_a_namespace_trick_works_without_the_filter_of_arguments(programs: Path) -> None:
    """clone3, whose flags no filter sees, seems not to exist."""
    for wall in ("untrusted", "moderate"):
        for name in ("clone3", "openat2"):
            assert int(jailed(programs, WALLS[wall], "call", syscalls._number(name), 0, 0, 0, 0, 0, 0).stdout) == errno.ENOSYS
    assert int(unjailed(programs, "call", syscalls._number("clone3"), 0, 0, 0, 0, 0, 0)) == errno.EINVAL


@pytest.mark.parametrize("wall", ["untrusted", "moderate"])
def test_kill_on_denial_ends_at_each_of_what_no_policy_has(wall: str, programs: Path) -> None:
    policy = WALLS[wall]
    assert policy.syscalls
    strict = replace(policy, syscalls=replace(policy.syscalls, on_denied="kill"))
    for name in (
        "ptrace",
        "mount",
        "bpf",
        "keyctl",
        "io_uring_setup",
        "userfaultfd",
        "perf_event_open",
        "kexec_load",
        "init_module",
        "setns",
    ):
        result = jailed(programs, strict, "call", syscalls._number(name), 0, 0, 0, 0, 0, 0)
        assert result.verdict is Verdict.syscall and result.evidence == {"syscall": name}, result.summary
