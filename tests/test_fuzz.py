"""Parsers meet anything: the plan, the order and the saved plan in C, the report and the policy in Python. `./dev fuzz SECONDS` goes on for longer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsjail_py import Jail, JailError, PolicyError, compiled, plan, policyfile, reports, saved
from nsjail_py._native import ffi

HERE = Path(__file__).resolve().parent / "fuzz"
NATIVE = HERE.parent.parent / "native"
SECONDS = int(os.environ.get("FUZZ_SECONDS", "12"))
SANITIZERS = "address,undefined"


def corpus(directory: Path) -> Path:
    """Real plans, orders and saved plans. The first byte says which of them, and whether the size is to be put right."""
    directory.mkdir()
    blocks: list[tuple[int, bytes]] = []
    for level in ("trusted", "moderate", "untrusted"):
        jail = Jail(level, workdir=str(directory))
        blocks.append((2, compiled.for_program(jail.policy, jail._host(), "/bin/true").plan))
        blocks.append((0, compiled.for_python(Jail(level).policy, jail._host()).plan))
    files = (plan.OrderFile("main.py", b"print(1)\n"), plan.OrderFile("data", b"", 0o400))
    blocks.append((3, plan.compile_order("/bin/sh", ["sh", "-c", "x"], {"A": "b"}, files, [0, 1, 2, 7])))
    blocks.append((1, plan.compile_order("/bin/true", ["true"], {})))
    for level, program in (("moderate", None), ("untrusted", "/bin/true")):
        saved.save(level, directory / "saved", program)
        blocks.append((6, (directory / "saved").read_bytes()))
    (directory / "saved").unlink()
    for number, (mark, block) in enumerate(blocks):
        (directory / str(number)).write_bytes(bytes([mark]) + block)
    return directory


def lines_run(flags: list[str | Path], directory: Path, *corpora: Path) -> str:
    """How much of plan.c the inputs go through that are worth keeping."""
    program, data = directory / "covering", directory / "data"
    raw = os.environ.get("FUZZ_PROFILE", directory / "raw")  # ./dev coverage counts it, too
    profile = [f"-fprofile-instr-generate={raw}", "-fcoverage-mapping"]
    subprocess.run(["clang", "-fsanitize=fuzzer", *profile, *flags, "-o", program, HERE / "blocks.c", NATIVE / "plan.c"], check=True)
    subprocess.run([program, "-runs=0", "-max_len=65536", *corpora], capture_output=True, check=True)
    subprocess.run(["llvm-profdata", "merge", "-o", data, raw], check=True)
    said = subprocess.run(
        ["llvm-cov", "report", f"-instr-profile={data}", program, NATIVE / "plan.c"], capture_output=True, text=True, check=True
    )
    regions, _, lines, *_ = re.findall(r"[\d.]+%", said.stdout.splitlines()[-1])
    return f"{lines} of plan.c's lines, {regions} of its regions"


def test_no_bytes_make_the_checks_of_plan_order_and_saved_plan_read_beyond_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, program, seeds = tmp_path / "found", tmp_path / "fuzz", corpus(tmp_path / "corpus")
    found.mkdir()
    sources = [HERE / "blocks.c", NATIVE / "plan.c"]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", f"-I{NATIVE}", "-fno-sanitize-recover=all", "-o", program]
    clang = shutil.which("clang")
    built = clang and subprocess.run([clang, f"-fsanitize=fuzzer,{SANITIZERS}", *flags, *sources], check=False).returncode == 0
    if built:
        command = [
            program,
            f"-max_total_time={SECONDS}",
            "-max_len=65536",
            "-print_final_stats=1",
            f"-artifact_prefix={tmp_path}/",
            found,
            seeds,
        ]
    else:  # no libFuzzer: the corpus and changed copies of it, under the same sanitizers
        subprocess.run(["gcc", f"-fsanitize={SANITIZERS}", *flags, HERE / "mutate.c", *sources], check=True)
        command = [program, seeds, str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"}, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    counted = re.search(r"(?:number_of_executed_units|runs): +(\d+)", said)
    assert counted and int(counted[1]) > 1000, said[-2000:]
    with capsys.disabled():
        covered = re.findall(r"cov: (\d+)", said)
        reached = lines_run(flags[:-2], tmp_path, found, seeds) if built and shutil.which("llvm-cov") else ""
        print(
            f" [{'libFuzzer' if built else 'mutations'}: {counted[1]} executions{f', {covered[-1]} edges' if covered else ''}{f', {reached}' if reached else ''}]",
            end="",
        )


JAIL = Jail("untrusted")
CONTEXT = reports.Context(JAIL.policy, "root", (), ())
SIZE = ffi.sizeof("struct report")


@settings(max_examples=300 * max(1, SECONDS // 12), deadline=None)
@given(st.binary(max_size=SIZE + 8) | st.binary(min_size=SIZE, max_size=SIZE))
def test_no_report_breaks_its_reader(message: bytes) -> None:
    """What is no report is one of our errors; never another exception."""
    with contextlib.suppress(JailError):
        reports.to_result(reports.parse(message), CONTEXT)


NUMBERS = st.integers(min_value=0, max_value=2**32 - 1)


@settings(max_examples=300 * max(1, SECONDS // 12), deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["kind", "flags", "step", "error", "detail", "cause", "cpu_source", "memory_source", "denied_count"]),
        NUMBERS | st.integers(0, 50),
    )
)
def test_no_report_with_odd_numbers_breaks_its_reader(fields: dict[str, int]) -> None:
    report = ffi.new("struct report *", fields)
    with contextlib.suppress(JailError):
        reports.to_result(reports.parse(bytes(ffi.buffer(report))), CONTEXT)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["limits", "syscalls", "mounts", "env", "python", "namespaces", "root", "hostname", "proc", "best_effort", "extends"]
)


@settings(max_examples=200 * max(1, SECONDS // 12), deadline=None)
@given(st.dictionaries(FIELDS | st.text(max_size=8), VALUES, max_size=4))
@example({"policy": None})
def test_no_override_breaks_the_policy(changes: dict[str, object]) -> None:
    with contextlib.suppress(PolicyError):
        policyfile.override(JAIL.policy, **changes)


@settings(max_examples=200 * max(1, SECONDS // 12), deadline=None)
@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(str.encode)
    | st.tuples(FIELDS, st.text(max_size=30)).map(lambda p: f"{p[0]} = {p[1]}".encode("utf-8", "replace"))
)
def test_no_file_breaks_the_policy_loader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with contextlib.suppress(PolicyError):
        policyfile.load(path)
