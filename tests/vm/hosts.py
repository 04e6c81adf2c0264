"""`./dev vm-test`: the suite in each test machine in each mode, and docs/hosts.md, which says how it went."""

from __future__ import annotations

import datetime
import io
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import images
import machine
from images import TroubleError
from machine import Machine, Outcome, User

DOCUMENT = images.TOP / "docs" / "hosts.md"
HEAD = "| distribution | kernel | mode | release | date | passed | failed | skipped, and why | boot | suite |"
RULE = "|---|---|---|---|---|---|---|---|---|---|"
SUITE = "@@ the suite"
ROOT_LEAVES_OUT = ["--ignore=tests/test_ordinary_user.py"]
"""It runs most of the suite again as a user, which the mode `plain` does here."""


@dataclass(frozen=True)
class Told:
    """What pytest said."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    reasons: dict[str, int]
    failures: list[str]
    elsewhere: dict[str, int] = field(default_factory=dict)


def understand(text: str) -> Told:
    """The end of pytest's output. Where it was broken off: what it had said of each test until then, and that counts as one failure more."""
    ends = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error|skipped).* in [\d.]+s", line)]
    if not ends:
        return _broken_off(text)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", ends[-1])}
    seconds = re.search(r" in ([\d.]+)s", ends[-1])
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return Told(
        counts.get("passed", 0),
        failed,
        counts.get("skipped", 0),
        float(seconds[1]) if seconds else 0.0,
        _reasons("SKIPPED", text),
        failures,
        _reasons("ELSEWHERE", text),
    )


def _reasons(word: str, text: str) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for number, reason in re.findall(rf"^{word} \[(\d+)\] [^ ]+ (.*)$", text, re.M):
        reasons[reason] = reasons.get(reason, 0) + int(number)
    return reasons


def _broken_off(text: str) -> Told:
    verdicts = re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    names = {verdict: [name for name, one in verdicts if one == verdict] for verdict in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failures = [*names["FAILED"], *names["ERROR"], f"broken off behind {verdicts[-1][0]}" if verdicts else "it said nothing"]
    return Told(len(names["PASSED"]), len(failures), len(names["SKIPPED"]), 0.0, {}, failures)


def row(which: Machine, release: str, user: str, date: str, told: Told, boot: float) -> str:
    skipped, elsewhere = ("; ".join(f"{reason} ({number})" for reason, number in each.items()) for each in (told.reasons, told.elsewhere))
    skipped = f"{told.skipped}: {skipped}".removesuffix(": ") + (f". Not for this host or user: {elsewhere}" if elsewhere else "")
    failed = f"{told.failed}: {', '.join(told.failures)}" if told.failed else "0"
    cells = [
        which.distro,
        which.kernel,
        user,
        release,
        date,
        str(told.passed),
        failed,
        skipped,
        f"{boot:.0f} s",
        f"{told.seconds / 60:.1f} min",
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def with_row(document: str, line: str) -> str:
    """The document with this row in its table, in the place of the one for the same distribution, kernel and mode."""
    head, rule, rest = document.partition(RULE + "\n")
    if not rule:
        raise ValueError(f"{DOCUMENT} has no table")
    rows, end = re.match(r"((?:\|[^\n]*\n)*)(.*)", rest, re.S).groups()  # type: ignore[union-attr]
    kept = [old for old in rows.splitlines() if old.split("|")[1:4] != line.split("|")[1:4]]
    return head + rule + "".join(f"{each}\n" for each in sorted([*kept, line])) + end


def with_doctor(document: str, title: str, report: str) -> str:
    """The document with what `nsjail-py doctor` said there, in the place of what it said the last time."""
    heading = f"### {title}\n"
    section = f"{heading}\n{''.join(f'    {line}'.rstrip() + chr(10) for line in report.strip().splitlines())}"
    before, found, after = document.partition(heading)
    if not found:
        return f"{document.rstrip()}\n\n{section}"
    following = re.search(r"^##", after, re.M)
    return before + section + (f"\n{after[following.start() :]}" if following else "")


class _Tee(io.RawIOBase):
    """Passes on, and remembers."""

    def __init__(self, out: BinaryIO) -> None:
        self.out, self.said = out, bytearray()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.said += data
        return self.out.write(data)

    def flush(self) -> None:
        self.out.flush()


def suite(which: Machine, user: User, arguments: list[str], seconds: float, document: Path = DOCUMENT) -> int:
    """One machine, one mode: runs the suite in it and writes down how it went. 1 if a test failed."""
    images.say(f"{which.distro}, kernel {which.kernel}, {user}")
    leave_out = ROOT_LEAVES_OUT if user == "root" else []
    tests = ["./dev", "test", "-v", "-rfEs", "--tb=short", "--durations=30", *leave_out, *arguments]
    script = './dev doctor; echo "$0"; exec "$@"'
    tee = _Tee(sys.stdout.buffer)
    trouble = None
    try:
        outcome = machine.run(which, user, ["sh", "-c", script, SUITE, *tests], cast(BinaryIO, tee), seconds)
    except TroubleError as error:
        outcome, trouble = Outcome(1, 0.0), error
    doctor, _, said = tee.said.decode(errors="replace").partition(SUITE)
    told = understand(said)
    if said and not arguments:  # else it was a part of the suite, or never began
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        text = with_row(document.read_text(), row(which, which.release, user, date, told, outcome.boot))
        report = doctor[max(doctor.find("What this host offers"), 0) :]
        document.write_text(with_doctor(text, f"{which.distro}, kernel {which.kernel}, {user}", report))
    if trouble:
        raise trouble
    return outcome.status


def smoke(which: Machine, seconds: float) -> int:
    """Runs and control groups, as root in a delegated unit and then as a user with a delegated group, in one boot."""
    tests = "./dev test -q -rs tests/test_run.py tests/test_cgroups.py"
    script = f'{tests} && exec sh /media/run-as delegated env "TEST_PATIENCE=$TEST_PATIENCE" {tests}'
    return machine.run(which, "root", ["sh", "-c", script], sys.stdout.buffer, seconds).status
