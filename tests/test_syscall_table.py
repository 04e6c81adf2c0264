"""docs/reference/syscalls.md is true: each system call that it lists is made in a jail, and what happens is what the page says.

The arguments are bad pointers, descriptors that nobody has and flags that do not exist, so that a call that is let through does nothing.
Whether a call was denied is taken from the launcher's count, not from the error: many calls fail with EPERM on their own.
"""

from __future__ import annotations

import errno
import os
import re
import runpy
import signal
import struct
import subprocess
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from conftest import ROOT

import nsjail_py
from nsjail_py import policyfile, syscalls
from nsjail_py._native import lib
from nsjail_py.result import Result, Verdict

pytestmark = [
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64"),
    pytest.mark.usefixtures("leaves_nothing"),
]

PAGE = (ROOT / "docs" / "reference" / "syscalls.md").read_text()
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
FILTERED = ["moderate", "untrusted"]
PAST_EVERY_FILTER = {335, 336}
BAD = 2**64 - 1
"""As a pointer not mapped, as a descriptor -1, as flags more than there are, as a size too large."""

PROBE = r"""
/* Reads (number, six arguments) from standard input, makes each call, and writes (number, answer) to standard output. */
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>
enum { MOST = 64 };
static long work[MOST][7], answer[2];
static void woken(int signal) { (void)signal; }
static long call(const long *w) {
	register long r10 __asm__("r10") = w[4], r8 __asm__("r8") = w[5], r9 __asm__("r9") = w[6];
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "0"(w[0]), "D"(w[1]), "S"(w[2]), "d"(w[3]), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return result;
}
static long call_i386(long number) {
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(-1L), "c"(-1L), "d"(-1L) : "memory", "r8", "r9", "r10", "r11");
	return result;
}
/* A child on the same stack may do nothing but end. */
static long call_vfork(void) {
	long result;
	__asm__ volatile("mov $58, %%eax\n\tsyscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\tmov $60, %%eax\n\txor %%edi, %%edi\n\tsyscall\n1:"
	: "=a"(result) : : "rcx", "r11", "rdi", "memory");
	return result;
}
int main(int count, char **arguments) {
	size_t size = 0;
	ssize_t got;
	while ((got = read(0, (char *)work + size, sizeof work - size)) > 0)
		size += (size_t)got;
	struct sigaction wake = {.sa_handler = woken}; /* no SA_RESTART: a call that waits ends with EINTR */
	sigaction(SIGALRM, &wake, NULL);
	for (size_t i = 0; i < size / sizeof *work; i++) {
		struct itimerval soon = {.it_value.tv_usec = 300000};
		setitimer(ITIMER_REAL, &soon, NULL);
		answer[0] = work[i][0];
		answer[1] = count > 1 ? call_i386(work[i][0]) : work[i][0] == 58 ? call_vfork() : call(work[i]);
		if (answer[1] == 0 && work[i][0] == 57) /* fork's child */
			_exit(0);
		if (write(1, answer, sizeof answer) != sizeof answer)
			return 9;
	}
	(void)arguments;
	return 0;
}
"""


class Row(NamedTuple):
    number: int
    name: str
    answers: dict[str, str]


class Condition(NamedTuple):
    name: str
    call: str
    arguments: list[tuple[int, int, list[int], list[int]]]
    """Number, mask, values that pass, and the one that does not where all others do."""


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, its own head left out."""
    part = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")][2:]


def argument_of(number: int, mask: int, how: str, values: list[int]) -> tuple[int, int, list[int], list[int]]:
    """What differs from a value differs in one bit, or in more."""
    if how == "in":
        return number, mask, values, []
    return number, mask, [mask & ~values[0], *(values[0] ^ 1 << bit for bit in range(mask.bit_length()))], values


ROWS = [
    Row(int(number), name, {"trusted": trusted, "moderate": moderate, "untrusted": untrusted})
    for number, name, trusted, moderate, untrusted in table("Every call")
]
KNOWN = [row for row in ROWS if syscalls.name_of(row.number) == row.name]
"""Those that this machine's libseccomp knows too: it may be older than the page."""
CONDITIONS = [
    Condition(
        name,
        call,
        [
            argument_of(int(argument), int(mask or "0xffffffff", 16), how, [int(value, 16) for value in values.split(",")])
            for argument, mask, how, values in re.findall(r"argument (\d)(?: & (0x\w+))? (in|not) ([^;]+)", text)
        ],
    )
    for name, call, text in table("Conditions")
]

ALONE: dict[str, tuple[str, Callable[[Result], bool]]] = {
    "exit": ("it ends the process", lambda r: r.exit_code == 255),
    "exit_group": ("it ends the process", lambda r: r.exit_code == 255),
    "rt_sigreturn": ("it jumps to what lies on the stack, which is no signal frame", lambda r: r.signal == signal.SIGSEGV),
}
"""Calls after which there is no next one: why, and how it shows that they were let through."""

ARGUMENTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "futex": ("an operation that does not exist answers ENOSYS: FUTEX_WAKE of a bad address instead", (BAD, 1, 1)),
    "pause": ("it waits until the probe's timer wakes it", ()),
    "vfork": ("its child runs on our stack: the probe makes it in assembly, and the child only ends", ()),
    "fork": ("the probe's child only ends", ()),
}
"""Calls whose arguments, or whose way of being made, are not the usual ones, and why."""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text(PROBE)
    program = folder / "probe"
    subprocess.run(["gcc", "-O1", "-w", "-static", "-o", str(program), str(folder / "probe.c")], check=True)
    program.chmod(0o755)
    return str(program)


def make(probe: str, policy: nsjail_py.Policy, calls: Sequence[tuple[int, ...]], *, i386: bool = False) -> tuple[dict[int, int], Result]:
    """Makes the calls (number, arguments ...) in one jail: what each answered, and how the run went."""
    work = b"".join(struct.pack("<7Q", *call, *(BAD,) * (7 - len(call))) for call in calls)
    result = nsjail_py.Jail(policy, wall_time=20).run([probe, *(["i386"] if i386 else [])], input=work)
    return dict(struct.iter_unpack("<qq", result.stdout[: len(result.stdout) // 16 * 16])), result


def in_groups(calls: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """A report names at most so many different calls."""
    size = min(40, lib.MAX_DENIED)
    return [list(calls[start : start + size]) for start in range(0, len(calls), size)]


def arguments_of(row: Row) -> tuple[int, ...]:
    return ARGUMENTS.get(row.name, ("", ()))[1]


def rows(policy: str, answer: str) -> list[Row]:
    return [row for row in KNOWN if row.answers[policy] == answer]


def unfiltered(policy: str) -> nsjail_py.Policy:
    return msgspec.structs.replace(policyfile.load(policy), syscalls=None)


# ---------------------------------------------------------------- the page itself


def test_the_page_is_generated_from_the_policies() -> None:
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))["syscall_page"]()
    assert len({row.number for row in ROWS}) == len({row.name for row in ROWS}) == len(ROWS), "each number and name once"
    unknown_here = {f"| {row.number} | {row.name} |" for row in ROWS if row not in KNOWN}
    expected = [line for line in PAGE.splitlines() if not any(line.startswith(start) for start in unknown_here)]
    assert generated.splitlines() == expected, "run docs/generate.py"
    assert len(KNOWN) > 350


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_every_call_of_the_kernel_headers_is_in_the_page_under_its_number() -> None:
    header = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}
    listed = {row.name: row.number for row in ROWS}
    last = max(listed.values())
    for name in ("uretprobe", "uprobe"):
        header.pop(name, None)  # passes every filter, by the kernel's own choice (docs/threat-model.md)
    assert {name: number for name, number in header.items() if number <= last and listed.get(name) != number} == {}


def test_every_answer_of_the_page_is_one_that_it_explains() -> None:
    names = {condition.name for condition in CONDITIONS}
    for row in ROWS:
        for answer in row.answers.values():
            assert answer in ("allowed", "`EPERM`", "`ENOSYS`") or (
                answer.startswith("if ") and set(re.findall("`(.*?)`", answer)) <= names
            ), row


# ---------------------------------------------------------------- the page against the kernel


@pytest.mark.parametrize("policy", FILTERED)
def test_what_the_page_calls_allowed_is_answered_by_the_kernel_as_without_a_filter(probe: str, policy: str) -> None:
    allowed = [(row.number, *arguments_of(row)) for row in rows(policy, "allowed") if row.name not in ALONE]
    assert len(allowed) > 140
    for group in in_groups(allowed):
        answers, result = make(probe, policyfile.load(policy), group)
        assert result.ok and result.denied == {}, result.summary
        without, result = make(probe, unfiltered(policy), group)
        assert result.ok and len(answers) == len(without) == len(group)
        errors = [{nr: min(answer, 0) for nr, answer in some.items()} for some in (answers, without)]
        assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("policy", FILTERED)
def test_a_call_after_which_there_is_no_next_one_is_let_through(probe: str, policy: str, name: str) -> None:
    (row,) = [row for row in rows(policy, "allowed") if row.name == name]
    answers, result = make(probe, policyfile.load(policy), [(row.number,)])
    assert answers == {} and result.denied == {} and ALONE[name][1](result), result.summary


@pytest.mark.parametrize("policy", FILTERED)
def test_what_the_page_calls_eperm_is_refused_and_counted(probe: str, policy: str) -> None:
    refused = rows(policy, "`EPERM`")
    assert len(refused) > 100
    for group in in_groups([(row.number,) for row in refused]):
        answers, result = make(probe, policyfile.load(policy), group)
        assert answers == {number: -errno.EPERM for (number,) in group}
        assert result.ok and result.denied == {syscalls.name_of(number): 1 for (number,) in group}


@pytest.mark.parametrize("policy", FILTERED)
def test_what_the_page_calls_enosys_seems_not_to_exist(probe: str, policy: str) -> None:
    hidden = rows(policy, "`ENOSYS`")
    assert {row.name for row in hidden} == {"clone3", "openat2"}
    answers, result = make(probe, policyfile.load(policy), [(row.number,) for row in hidden])
    assert answers == {row.number: -errno.ENOSYS for row in hidden} and result.denied == {}


def held(row: Row, policy: str) -> list[Condition]:
    """The conditions of which one must hold, by the page."""
    named = re.findall("`(.*?)`", row.answers[policy])
    return [condition for condition in CONDITIONS if condition.call == row.name and condition.name in named]


def with_argument(arguments: list[int], number: int, mask: int, value: int) -> list[int]:
    """The looked-at bits of one argument set, all others, the 32 high ones included, as they were."""
    return [(a & ~mask | value) if i == number else a for i, a in enumerate(arguments)]


@pytest.mark.parametrize("policy", FILTERED)
def test_what_fulfils_a_condition_of_the_page_is_let_through(probe: str, policy: str) -> None:
    calls = []
    for row in [row for row in KNOWN if row.answers[policy].startswith("if ")]:
        for condition in held(row, policy):
            numbers, masks, values, _ = zip(*condition.arguments, strict=True)
            for choice in product(*values):
                arguments = [BAD] * 6
                for number, mask, value in zip(numbers, masks, choice, strict=True):
                    arguments = with_argument(arguments, number, mask, value)
                if row.name == "clone":  # CLONE_THREAD without CLONE_SIGHAND, which is EINVAL: nothing starts
                    arguments[0] = 0x10000
                calls.append((row.number, *arguments))
    assert len(calls) > 60
    for group in in_groups(calls):
        answers, result = make(probe, policyfile.load(policy), group)
        assert result.ok and result.denied == {}, result.denied
        assert set(answers) == {number for number, *_ in group}
        absent = [call for call in group if answers[call[0]] == -errno.ENOSYS]  # from this kernel, or it is the filter's doing
        assert set(make(probe, unfiltered(policy), absent)[0].values()) <= {-errno.ENOSYS}


@pytest.mark.parametrize("policy", FILTERED)
def test_what_fails_one_part_of_a_condition_is_refused(probe: str, policy: str) -> None:
    """Each looked-at argument in turn has a value that passes in none of the alternatives, the others one that would."""
    calls = []
    for row in [row for row in KNOWN if row.answers[policy].startswith("if ")]:
        alternatives = held(row, policy)
        for number, mask, _, only in alternatives[0].arguments:
            good = {value for c in alternatives for n, _, values, _ in c.arguments if n == number for value in values}
            arguments = [BAD] * 6
            for n, m, values, _ in alternatives[0].arguments:
                arguments = with_argument(arguments, n, m, values[0])
            low = mask & -mask  # the lowest bit that is looked at
            bad = only[0] if only else next(v for k in range(1, 100) if (v := (k * low) & mask) not in good)
            calls.append((row.number, *with_argument(arguments, number, mask, bad)))
    answers, result = make(probe, policyfile.load(policy), calls)
    assert set(answers.values()) == {-errno.EPERM} and result.ok
    assert sum(result.denied.values()) == len(calls)


# ---------------------------------------------------------------- what is not in the table


@pytest.mark.parametrize("policy", FILTERED)
def test_a_number_that_no_row_has_is_refused(probe: str, policy: str) -> None:
    gaps = sorted(set(range(ROWS[-1].number)) - {row.number for row in ROWS} - PAST_EVERY_FILTER)
    assert len(gaps) > 50
    for group in in_groups([(number,) for number in gaps]):
        answers, result = make(probe, policyfile.load(policy), group)
        assert answers == {number: -errno.EPERM for (number,) in group}
        assert result.denied == {f"syscall {number}": 1 for (number,) in group}


@pytest.mark.parametrize("policy", FILTERED)
def test_the_two_calls_that_pass_every_filter_do_nothing(probe: str, policy: str) -> None:
    answers, result = make(probe, policyfile.load(policy), [(335,)])
    assert result.signal == signal.SIGILL or (result.denied == {"syscall 335": 1} and answers == {335: -errno.EPERM})
    answers, result = make(probe, policyfile.load(policy), [(336,)])
    assert answers in ({336: -errno.ENXIO}, {336: -errno.EPROTO}) or (
        result.denied == {"syscall 336": 1} and answers == {336: -errno.EPERM}
    )


@pytest.mark.parametrize("policy", FILTERED)
def test_a_number_above_all_known_seems_not_to_exist_and_is_counted(probe: str, policy: str) -> None:
    allowed = policyfile.load(policy).syscalls
    assert allowed is not None
    first = syscalls.compile_filter(allowed).unknown_from
    assert first > ROWS[-1].number or KNOWN != ROWS
    for group in in_groups([(number,) for number in (*range(first, 560), 999, 0x3FFFFFFF, 0xFFFFFFFF)]):
        answers, result = make(probe, policyfile.load(policy), group)
        assert set(answers.values()) == {-errno.ENOSYS} and len(answers) == len(group)
        assert sum(result.denied.values()) == len(group) and set(result.denied.values()) == {1}


@pytest.mark.parametrize("policy", FILTERED)
@pytest.mark.parametrize(
    "number", [0, 39, 57, 101, 512, 520, 547]
)  # read, getpid, fork, ptrace; rt_sigaction, execve, pwritev2 of x32 alone
def test_x32_is_killed(probe: str, policy: str, number: int) -> None:
    answers, result = make(probe, policyfile.load(policy), [(number | 0x40000000,)])
    assert answers == {} and (result.verdict, result.signal) == (Verdict.syscall, signal.SIGSYS)


@pytest.mark.parametrize("policy", FILTERED)
@pytest.mark.parametrize("number", [3, 20, 2, 26, 120])  # read, getpid, fork, ptrace, clone
def test_i386_is_killed(probe: str, policy: str, number: int) -> None:
    if make(probe, unfiltered(policy), [(20,)], i386=True)[1].signal is not None:
        pytest.skip("this kernel has no 32-bit entry")
    answers, result = make(probe, policyfile.load(policy), [(number,)], i386=True)
    assert answers == {} and (result.verdict, result.signal) == (Verdict.syscall, signal.SIGSYS)


def test_trusted_has_no_filter(probe: str) -> None:
    for row in ROWS:
        assert row.answers["trusted"] == "allowed"
    unshare, ptrace, keyctl = (next(row.number for row in ROWS if row.name == name) for name in ("unshare", "ptrace", "keyctl"))
    answers, result = make(probe, policyfile.load("trusted"), [(unshare,), (ptrace,), (keyctl,)])
    assert answers[unshare] == -errno.EINVAL and answers[keyctl] in (-errno.EOPNOTSUPP, -errno.EINVAL) and result.denied == {}
    status = nsjail_py.run_python("print(open('/proc/self/status').read())", policy="trusted").check().stdout.decode()
    assert re.search(r"^Seccomp:\t0$", status, re.M) or re.search(r"^Seccomp:\t2$", Path("/proc/self/status").read_text(), re.M)
