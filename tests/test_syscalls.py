"""The filter, judged by running its bytes: a small interpreter for the part of BPF that seccomp uses stands in for the kernel."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from nsjail_py import policyfile, syscalls
from nsjail_py.errors import PolicyError
from nsjail_py.policy import Syscalls

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, NOTIFY, KILL_PROCESS = 0x7FFF0000, 0x7FC00000, 0x80000000
ENOSYS = 0x00050000 | errno.ENOSYS
HIGH = 0xDEAD_BEEF << 32
NR = {
    "read": 0, "write": 1, "open": 2, "mmap": 9, "ioctl": 16, "socket": 41, "connect": 42, "socketpair": 53, "clone": 56, "fork": 57,
    "vfork": 58, "execve": 59, "exit": 60, "kill": 62, "fcntl": 72, "chmod": 90, "fchmod": 91, "ptrace": 101, "mknod": 133,
    "personality": 135, "prctl": 157, "futex": 202, "openat": 257, "fchmodat": 268, "unshare": 272, "prlimit64": 302, "execveat": 322,
    "io_uring_setup": 425, "clone3": 435, "openat2": 437, "munmap": 11,
}  # fmt: skip
THREAD = 0x003D0F00  # what pthread_create asks for
PROCESS = 0x01200011  # what fork() asks for


def decide(bpf: bytes, nr: int, *args: int, arch: int = X86_64) -> int:
    """The action for one call, as the kernel computes it (Documentation/networking/filter.rst)."""
    padded = [value & (2**64 - 1) for value in (*args, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<IIQ6Q", nr & 0xFFFFFFFF, arch, 0, *padded)
    program = list(struct.iter_unpack("<HBBI", bpf))
    jumps = {0x15: lambda a, k: a == k, 0x25: lambda a, k: a > k, 0x35: lambda a, k: a >= k, 0x45: lambda a, k: bool(a & k)}
    accumulator = pc = 0
    while True:
        code, jt, jf, k = program[pc]
        pc += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            pc += k
        elif code in jumps:
            pc += jt if jumps[code](accumulator, k) else jf
        elif code == 0x06:
            return k
        else:
            raise AssertionError(f"unknown instruction {code:#x}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bpf():
    return {name: syscalls._compile(policyfile.load(name).syscalls).bpf for name in ("moderate", "untrusted")}


@pytest.mark.parametrize("policy", ["moderate", "untrusted"])
class TestEveryFilter:
    def test_kills_foreign_architectures(self, bpf, policy):
        assert {decide(bpf[policy], nr, arch=I386) for nr in range(450)} == {KILL_PROCESS}

    def test_kills_x32(self, bpf, policy):
        assert {decide(bpf[policy], nr | 0x40000000) for nr in range(600)} == {KILL_PROCESS}

    def test_reports_numbers_that_nobody_knows(self, bpf, policy):
        assert {decide(bpf[policy], nr) for nr in (500, 999, 0x3FFFFFFF, 0xFFFFFFFF)} == {NOTIFY}

    def test_reports_what_is_newer_than_some_libraries(self, bpf, policy):
        # open_tree, move_mount, fsopen, fsconfig, fsmount, fspick; mount_setattr, quotactl_fd, memfd_secret; statmount, listmount;
        # open_tree_attr
        assert {decide(bpf[policy], nr) for nr in (*range(428, 434), 442, 443, 447, 457, 458, 467)} == {NOTIFY}

    def test_never_allows_what_no_shipped_set_has(self, bpf, policy):
        numbers = [number for name in syscalls.never() if (number := syscalls._number(name)) >= 0]
        assert len(numbers) > 60
        assert {decide(bpf[policy], number, *args) for number in numbers for args in [(), (0,) * 6, (2**64 - 1,) * 6]} == {NOTIFY}

    def test_agrees_with_the_sets_on_every_call(self, bpf, policy):
        rules = syscalls._rules(policyfile.load(policy).syscalls)
        for nr in range(syscalls._unknown_from(syscalls._library())):
            name = syscalls.name_of(nr)
            expected = ENOSYS if name in ("clone3", "openat2") else ALLOW if () in rules.get(name, ()) else NOTIFY
            if name not in rules or () in rules[name]:
                assert decide(bpf[policy], nr) == expected, name
            for alternative in rules.get(name, ()):
                args = [0] * 6
                for arg, _, value in alternative:
                    args[arg] = value
                assert decide(bpf[policy], nr, *args) == ALLOW, (name, args)

    def test_refuses_namespaces_in_clone_wherever_the_other_bits_are(self, bpf, policy):
        for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x2000):
            for base in (THREAD, PROCESS, 0, HIGH):
                assert decide(bpf[policy], NR["clone"], base | flag) == NOTIFY
        assert decide(bpf[policy], NR["clone"], THREAD) == ALLOW

    def test_hides_the_calls_whose_flags_lie_in_memory(self, bpf, policy):
        assert decide(bpf[policy], NR["clone3"]) == decide(bpf[policy], NR["openat2"]) == ENOSYS

    @pytest.mark.parametrize("request_", [0x5412, 0x541C])  # TIOCSTI, TIOCLINUX
    def test_refuses_to_type_into_terminals_whatever_the_high_bits(self, bpf, policy, request_):
        for high in (0, 1 << 32, HIGH, 0xFFFFFFFF << 32):
            assert decide(bpf[policy], NR["ioctl"], 0, high | request_) == NOTIFY
            assert decide(bpf[policy], NR["ioctl"], 0, high | 0x5401) == ALLOW

    def test_refuses_setuid_bits_and_devices(self, bpf, policy):
        for name, arg in [("chmod", 1), ("fchmod", 1), ("fchmodat", 2), ("open", 2), ("openat", 3)]:
            for mode, action in [(0o755, ALLOW), (0o1777, ALLOW), (0o4755, NOTIFY), (0o2755, NOTIFY), (HIGH | 0o644, ALLOW)]:
                assert decide(bpf[policy], NR[name], *[0] * arg, mode) == action, (name, oct(mode))
        for mode, action in [(0o010600, ALLOW), (0o020666, NOTIFY), (0o060666, NOTIFY), (0o104755, NOTIFY)]:
            assert decide(bpf[policy], NR["mknod"], 0, mode) == action

    def test_allows_limits_of_the_own_process_only(self, bpf, policy):
        assert decide(bpf[policy], NR["prlimit64"], 0) == ALLOW
        assert decide(bpf[policy], NR["prlimit64"], 1) == NOTIFY

    def test_lets_personality_be_asked_but_not_changed(self, bpf, policy):
        assert decide(bpf[policy], NR["personality"], 0xFFFFFFFF) == ALLOW
        assert decide(bpf[policy], NR["personality"], 0x0040000) == NOTIFY  # ADDR_NO_RANDOMIZE


def test_untrusted_has_threads_but_no_processes_programs_or_sockets(bpf):
    program = bpf["untrusted"]
    for name, args in [("fork", ()), ("vfork", ()), ("clone", (PROCESS,)), ("execve", ()), ("execveat", ()), ("connect", ())]:
        assert decide(program, NR[name], *args) == NOTIFY, name
    assert {decide(program, NR["socket"], domain, kind) for domain in range(50) for kind in range(1, 11)} == {NOTIFY}
    assert decide(program, NR["socketpair"], 1, 0x80801) == ALLOW  # AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK
    assert decide(program, NR["socketpair"], 2, 1) == NOTIFY


def test_moderate_has_processes_and_programs_and_plain_sockets(bpf):
    program = bpf["moderate"]
    for name, args in [("fork", ()), ("vfork", ()), ("clone", (PROCESS,)), ("clone", (0x4111,)), ("execve", ()), ("connect", ())]:
        assert decide(program, NR[name], *args) == ALLOW, name
    allowed = {(d, k) for d in range(50) for k in range(16) if decide(program, NR["socket"], d, k) == ALLOW}
    assert allowed == {(1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (10, 1), (10, 2)}
    assert decide(program, NR["socket"], HIGH | 40, 1) == NOTIFY  # AF_VSOCK
    assert decide(program, NR["socket"], 2, 1, 132) == NOTIFY  # SCTP


def test_what_the_jail_itself_calls_last_is_told_apart_where_the_program_may_not_call_it():
    late = set(syscalls.compile_filter(policyfile.load("untrusted").syscalls).late)
    assert late == {syscalls._number(name) for name in ("execveat", "fcntl", "openat", "fchmod", "landlock_restrict_self", "prlimit64")}
    least = syscalls.compile_filter(Syscalls(exec=False)).late
    assert {syscalls._number(name) for name in syscalls.LATE} == set(least)
    assert not set(least) & {NR[name] for name in ("read", "write", "munmap")}, "the kernel's own table answers for these"


def test_the_smallest_filter_still_has_the_essential_calls():
    program = syscalls.compile_filter(Syscalls(exec=False)).bpf
    assert {decide(program, NR[name]) for name in ("read", "write", "mmap", "futex", "exit")} == {ALLOW}
    assert decide(program, NR["open"]) == decide(program, NR["kill"]) == NOTIFY


def test_denied_names_are_taken_out_again():
    program = syscalls.compile_filter(Syscalls(allow=("@signals", "@threads", "getcpu"), deny=("kill", "@processes"))).bpf
    assert decide(program, NR["kill"]) == decide(program, NR["fork"]) == decide(program, NR["clone"], PROCESS) == NOTIFY
    assert decide(program, NR["clone"], THREAD) == decide(program, 309) == ALLOW


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"allow": ("@file",)}, "'@file' is no set (did you mean \"@files\"?)"),
        ({"allow": ("opena",)}, "no system call that libseccomp knows (did you mean"),
        ({"allow": ("read\0",)}, "no system call"),
        ({"allow": ("getcpu",), "deny": ("getcpu",)}, "is allowed as well"),
        ({"allow": ("clone",)}, "through @threads or @processes only"),
        ({"allow": ("clone3",)}, "always answers ENOSYS"),
        ({"allow": ("execve",), "exec": False}, "contradicts exec = false"),
        ({"deny": ("mmap",)}, "no program would even start"),
        ({"allow": ("@never",)}, "is no set"),
    ],
)
def test_senseless_names_are_told(fields, said):
    with pytest.raises(PolicyError) as caught:
        syscalls.compile_filter(Syscalls(**fields))
    assert said in str(caught.value)


def test_a_single_call_that_has_conditions_keeps_them():
    program = syscalls.compile_filter(Syscalls(allow=("ioctl",))).bpf
    assert decide(program, NR["ioctl"], 0, 0x5412) == NOTIFY


def test_every_listed_call_exists():
    assert {name for name in syscalls._listed() if syscalls._number(name) == -1} <= {"fchmodat2"}  # newer than some libseccomp


def test_a_damaged_cache_entry_is_compiled_again():
    wanted = policyfile.load("untrusted").syscalls
    first = syscalls.compile_filter(wanted)
    path = syscalls._cached(syscalls._key(wanted))
    assert syscalls._restore(path) == first
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", NOTIFY), struct.pack("<I", ALLOW)))
    assert syscalls._restore(path) is None
    assert syscalls.compile_filter(wanted) == first
    assert syscalls._restore(path) == first


def test_numbers_have_names():
    assert [syscalls.name_of(nr) for nr in (0, 59, 999)] == ["read", "execve", "syscall 999"]
