"""`nsjail-py learn`: a trusted sample under observation gives the smallest policy that runs it, and `why` explains what a changed one is denied."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import PATIENCE

import nsjail_py
from nsjail_py import observe, policyfile, syscalls, why
from nsjail_py._native import ffi, lib
from nsjail_py.compiled import for_python
from nsjail_py.learn import Learned, learn
from nsjail_py.policy import Syscalls

SAMPLES = {
    "hello": "print('hello')",
    "numpy": "import numpy\nprint(numpy.ones((300, 300)).dot(numpy.ones((300, 300)))[0, 0])",
    "sqlite": """
import sqlite3
db = sqlite3.connect("data.db")
db.execute("create table t(x)")
db.execute("insert into t values (42)")
db.commit()
open("/work/out.txt", "w").write(str(db.execute("select x from t").fetchone()))
print(open("/work/out.txt").read())
""",
    "child": """
import subprocess, threading
made = threading.Thread(target=lambda: open("/tmp/x", "w").close())
made.start(); made.join()
print(subprocess.run(["/bin/echo", "from a child"], capture_output=True).stdout)
""",
}
MORE = {
    "hello": ("import os\nos.mkdir('d')\nprint(os.fork())", {"mkdir", "clone"}),
    "numpy": ("import numpy, socket\nsocket.socket(socket.AF_UNIX)", {"socket"}),
    "sqlite": ("import sqlite3, os\nos.system('true')", {"clone"}),
    "child": ("import os, ctypes\nos.mkdir('d')", {"mkdir"}),
}
"""What a changed sample does more, and which calls of it are denied."""


@pytest.fixture(scope="module")
def learned() -> dict[str, Learned]:
    return {}


def of(name: str, known: dict[str, Learned]) -> Learned:
    if name not in known:
        known[name] = learn(SAMPLES[name].encode(), name=f"sample_{name}.py")
    return known[name]


def run(text: str, source: str, tmp_path: Path) -> nsjail_py.Result:
    (tmp_path / "learned.toml").write_text(text)
    return nsjail_py.run_python(source, policy=tmp_path / "learned.toml")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_learned_policy_runs_its_sample(name: str, learned: dict[str, Learned], tmp_path: Path) -> None:
    one = of(name, learned)
    assert one.result.ok, one.result.stderr
    result = run(one.text, SAMPLES[name], tmp_path)
    assert result.ok and result.stdout == one.result.stdout and result.denied == {}, (
        result.summary,
        result.stderr,
        result.denied,
        one.text,
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_a_changed_sample_that_does_more_is_denied_and_told_the_right_lines(name: str, learned: dict[str, Learned], tmp_path: Path) -> None:
    source, calls = MORE[name]
    result = run(of(name, learned).text, f"try:\n  exec({source!r})\nexcept OSError: pass", tmp_path)
    assert set(result.denied) & calls, (result.summary, result.denied, result.stderr)
    policy = policyfile.load(tmp_path / "learned.toml")
    for denial in why.why(result, policy):
        assert denial.ways, denial
        (tmp_path / "changed.toml").write_text('extends = "./learned.toml"\n' + "\n".join(denial.ways[-1].lines))
        changed = policyfile.load(tmp_path / "changed.toml")
        assert changed.syscalls and denial.what.partition(",")[0] in syscalls.calls_of(changed.syscalls)


def test_the_smallest_policy_is_smaller_than_the_one_that_it_extends(learned: dict[str, Learned], tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(of("hello", learned).text)
    small, whole = policyfile.load(tmp_path / "p.toml").syscalls, policyfile.load("untrusted").syscalls
    assert small and whole and not small.exec
    assert set(syscalls.calls_of(small)) < set(syscalls.calls_of(whole))
    assert len(syscalls.calls_of(small)) < len(syscalls.calls_of(whole)) / 2


def test_every_entry_says_which_step_needed_it(learned: dict[str, Learned]) -> None:
    text = of("child", learned).text
    # By which of these a child is made is the C library's and the interpreter's affair.
    assert any(f"{how}, # {what}the script" in text for how, what in (('"vfork"', ""), ('"@processes"', "clone, "))), text
    assert "exec = true # /bin/echo" in text
    assert '[[mounts]] # execute: the script\nsource = "/bin/echo"' in text
    assert '"numpy", # the script: ' in of("numpy", learned).text


def test_nothing_else_of_the_host_is_shown_by_a_learned_policy(learned: dict[str, Learned], tmp_path: Path) -> None:
    source = "import os\nprint([os.path.exists(p) for p in ('/bin/echo', '/bin/sh', '/bin/cat', '/etc/shadow', '/root')])"
    assert run(of("child", learned).text, source, tmp_path).check().stdout in (
        b"[True, False, False, False, True]\n",
        b"[True, False, False, False, False]\n",
    )


def test_a_file_of_the_host_that_was_read_is_shown_and_no_other(place: Path, tmp_path: Path) -> None:
    (place / "data").write_text("data")
    (place / "other").write_text("other")
    source = f"print(open('{place}/data').read())"
    text = learn(source.encode()).text
    assert run(text, source, tmp_path).check().stdout == b"data\n"
    assert b"FileNotFoundError" in run(text, f"open('{place}/other')", tmp_path).stderr


def test_a_file_may_have_any_name_that_is_unicode(place: Path, tmp_path: Path) -> None:
    path = place / "\N{GRINNING FACE} \x1b\x7f\u2028"
    path.write_text("data")
    source = f"print(open({str(path)!a}).read())"
    assert run(learn(source.encode()).text, source, tmp_path).check().stdout == b"data\n"


def test_the_variables_of_a_sample_are_in_its_policy(cli: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import os\nif os.environ['B'] == 'b \"': print(os.environ['A'])")
    policy, surroundings = tmp_path / "p.toml", {**os.environ, "A": "a secret"}
    for command in (
        [*cli, "learn", "--env", "A", "--env", 'B=b "', "--env", "NOT-THERE", "-o", policy, tmp_path / "s.py"],
        [*cli, "run", "--policy", policy, tmp_path / "s.py"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=60 * PATIENCE, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "a secret\n")
    assert "secret" not in policy.read_text(), "what is passed on is no text for a file"


def test_the_last_run_sees_no_package_that_the_policy_does_not_list() -> None:
    one = learn(b"import os, sys\nprint([path for path in (*os.listdir('/'), *sys.path) if 'packages' in path and 'python' not in path])")
    assert one.result.stdout == b"[]\n"


@pytest.mark.parametrize("look", [
    "os.path.getsize(path)", "os.lstat(path)", "os.access(path, os.R_OK)", "os.stat('data', dir_fd=os.open(os.path.dirname(path), os.O_PATH))",
    "lib.statx(-100, path.encode(), 0, 0xfff, ctypes.create_string_buffer(256)) and 1 / 0",
])  # fmt: skip
def test_a_file_of_the_host_that_was_only_looked_at_is_shown(look: str, place: Path, tmp_path: Path) -> None:
    path = place / "data"
    path.write_text("data")
    source = f"import ctypes, os\nlib, path = ctypes.CDLL(None), {str(path)!r}\n{look}\nprint('seen')"
    one = learn(source.encode())
    assert one.result.stdout == b"seen\n" and f'# look: the script\nsource = "{path}"' in one.text
    assert run(one.text, source, tmp_path).check().stdout == b"seen\n"


def test_a_directory_that_was_only_looked_at_is_told_and_not_shown(place: Path, tmp_path: Path) -> None:
    (place / "secret").touch()
    one = learn(f"import os\nprint(os.path.isdir({str(place)!r}), os.path.isdir('/var/tmp/none'))".encode())
    assert one.result.stdout == b"False False\n"
    assert f"# - looked at {place}: " in one.text and "/var/tmp/none" not in one.text
    assert "[[mounts]]" not in one.text


def test_what_everything_looks_at_is_not_in_a_policy(learned: dict[str, Learned]) -> None:
    for name in SAMPLES:
        text = of(name, learned).text
        assert "look: " not in text and "looked at" not in text, text


def test_runs_are_merged(tmp_path: Path) -> None:
    source = "import sys, os\nif sys.argv[1] == 'a': os.mkdir('d')\nelse: os.symlink('a', 'b')"
    first = learn(source.encode(), ["a"])
    both = learn(source.encode(), ["b"], earlier=[observe.load(observe.dump(first.seen))])
    (tmp_path / "p.toml").write_text(both.text)
    for way in "ab":
        result = nsjail_py.run_python(source, args=[way], policy=tmp_path / "p.toml")
        assert result.ok and result.denied == {}
    (tmp_path / "p.toml").write_text(first.text)
    assert set(nsjail_py.run_python(source, args=["b"], policy=tmp_path / "p.toml").denied) <= {"symlink", "symlinkat"} != set()


def test_forks_and_threads_of_a_sample_are_seen_too() -> None:
    source = """
import os, threading
if (pid := os.fork()) == 0:
    os.mkdir('/work/from-the-child'); os._exit(0)
os.waitpid(pid, 0)
made = threading.Thread(target=lambda: os.symlink('a', '/work/from-a-thread')); made.start(); made.join()
"""
    seen, result = observe.observe(source.encode())
    assert result.ok
    assert seen.calls["mkdir"].first == "/work/from-the-child" and seen.calls["symlink"].first == "/work/from-a-thread"


def test_what_no_shipped_policy_has_is_refused_to_a_sample_too(tmp_path: Path) -> None:
    source = "import ctypes\nlib = ctypes.CDLL(None, use_errno=True)\nprint(lib.unshare(0x10000000), ctypes.get_errno())"
    one = learn(source.encode())
    assert one.result.stdout == b"-1 1\n"
    assert "# - unshare, " in one.text
    (tmp_path / "p.toml").write_text(one.text)
    policy = policyfile.load(tmp_path / "p.toml")
    assert policy.syscalls and "unshare" not in syscalls.calls_of(policy.syscalls)


def test_a_sample_changes_nothing_of_the_host(tmp_path: Path) -> None:
    target = Path("/var/tmp") / f"nsjail-{os.getpid()}-{tmp_path.name}"
    one = learn(f"open('{target}', 'w')".encode())
    assert not target.exists() and not one.result.ok
    assert f"# - changed {target}" in one.text


def test_no_policy_can_ask_to_be_observed(tmp_path: Path) -> None:
    """The flag is set by observe.py alone: no field, no text, no plan of a policy has it."""
    for name in policyfile.names():
        jail = nsjail_py.Jail(name)
        plan = for_python(jail.policy, jail._host()).plan
        assert not ffi.from_buffer("struct plan *", plan).flags & lib.PLAN_OBSERVED
    (tmp_path / "p.toml").write_text('extends = "untrusted"\nobserved = true\n')
    assert policyfile.check(tmp_path / "p.toml")


def test_an_observed_plan_without_a_filter_is_refused() -> None:
    jail = observe.ObservingJail("trusted", stock=0)
    with pytest.raises(nsjail_py.SetupError, match="plan"):
        jail.run_python("print(1)")


def test_a_caller_that_does_not_answer_ends_with_its_limit() -> None:
    """Nobody takes the listener: the sample waits in its first call, and the clock ends it."""
    jail = observe.ObservingJail(observe.policy(None, {"wall_time": 0.5}), stock=0)
    with jail.start_python("print(1)", stdout=nsjail_py.PIPE) as process:
        watch = observe.Watch(process, "/app/main.py")
        assert watch.listener >= 0
        try:
            assert process.wait(20 * PATIENCE).verdict == "wall_time"
        finally:
            os.close(watch.listener)


def test_observation_leaves_nothing(leaves_nothing: None) -> None:
    observe.observe(b"print(1)")


def test_what_was_seen_may_have_any_name(tmp_path: Path, cli: list[str]) -> None:
    (tmp_path / "s.py").write_text(r"import os; print(os.path.exists(b'/tmp/\xff'))")
    for _ in range(2):
        command = [*cli, "learn", "--seen", tmp_path / "seen", "-o", tmp_path / "p.toml", tmp_path / "s.py"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60 * PATIENCE)
        assert (done.returncode, done.stderr) == (0, b"False\n")
        assert "/tmp/\udcff" in observe.load((tmp_path / "seen").read_bytes()).files
    policyfile.load(tmp_path / "p.toml")


def test_a_script_may_have_any_name(tmp_path: Path, cli: list[str]) -> None:
    path = bytes(tmp_path) + b"/\xff.py"
    with open(path, "w") as script:
        script.write("print('seen')")
    done = subprocess.run([*cli, "learn", "-o", tmp_path / "p.toml", path], capture_output=True, check=False, timeout=60 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"seen\n")
    assert policyfile.load(tmp_path / "p.toml").description == r"Learned from \udcff.py"


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"{}x", b"[]", b'{"files": 1}', b'{"files": {"x": {"y": 1}}}'])
def test_what_no_run_has_written_is_an_error_of_one_line(data: bytes, tmp_path: Path, cli: list[str]) -> None:
    (tmp_path / "seen").write_bytes(data)
    (tmp_path / "s.py").touch()
    done = subprocess.run([*cli, "learn", "--seen", tmp_path / "seen", tmp_path / "s.py"], capture_output=True, check=False)
    assert done.returncode == 125 and b"is not what an earlier run has written" in done.stderr and done.stderr.count(b"\n") == 1


def test_strange_file_names_cannot_add_lines_to_the_policy(tmp_path: Path) -> None:
    source = "import os\nname = '/work/x\\n[syscalls]\\nallow = [\"@inet-sockets\"]\\n#'\nos.makedirs(os.path.dirname(name))\n"
    one = learn(source.encode())
    (tmp_path / "p.toml").write_text(one.text)
    policy = policyfile.load(tmp_path / "p.toml")
    assert policy.syscalls and "socket" not in syscalls.calls_of(policy.syscalls)


def test_the_command_writes_a_policy_and_merges(cli: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import sys, os\nprint('out')\nif sys.argv[1:]: os.mkdir('d')")
    policy, seen = tmp_path / "p.toml", tmp_path / "seen.json"
    for args in ([], ["d"]):
        command = [*cli, "learn", "-o", str(policy), "--seen", str(seen), str(tmp_path / "s.py"), *args]
        done = subprocess.run(command, capture_output=True, timeout=60 * PATIENCE, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"out\n")
        assert ('"mkdir"' in policy.read_text()) is bool(args)
    done = subprocess.run([*cli, "learn", str(tmp_path / "s.py")], capture_output=True, timeout=60 * PATIENCE, check=False)
    assert b'extends = "untrusted"' in done.stdout and done.returncode == 0
    seen.write_text("{}x")
    done = subprocess.run(
        [*cli, "learn", "--seen", str(seen), str(tmp_path / "s.py")], capture_output=True, timeout=60 * PATIENCE, check=False
    )
    assert done.returncode == 125 and len(done.stderr.splitlines()) == 1
    (tmp_path / "s.py").write_text("raise SystemExit(3)")
    done = subprocess.run([*cli, "learn", str(tmp_path / "s.py")], capture_output=True, timeout=60 * PATIENCE, check=False)
    assert done.returncode == 1 and b"the sample failed" in done.stderr


@pytest.mark.parametrize("option", ["-o", "--seen"])
@pytest.mark.parametrize("place", ["nowhere/file", "."])
def test_where_nothing_can_be_written_the_sample_is_not_run(option: str, place: str, tmp_path: Path, cli: list[str]) -> None:
    (tmp_path / "s.py").write_text("print('it runs')")
    done = subprocess.run([*cli, "learn", option, tmp_path / place, tmp_path / "s.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, "", 1)
    assert str(tmp_path / place) in done.stderr and "it runs" not in done.stderr


def test_a_policy_that_was_there_outlives_an_error_of_the_next(tmp_path: Path, cli: list[str]) -> None:
    (tmp_path / "policy").write_text("before")
    options = ["-o", tmp_path / "policy", "--project", "/nonexistent"]
    done = subprocess.run([*cli, "learn", *options, "/dev/null"], capture_output=True, check=False)
    assert done.returncode == 125 and (tmp_path / "policy").read_text() == "before"


def test_a_policy_is_learned_without_a_standard_error(tmp_path: Path, cli: list[str]) -> None:
    (tmp_path / "s.py").write_text("print('out')")
    (tmp_path / "link").symlink_to("policy.toml")
    command = f"{' '.join(cli)} learn -o {tmp_path / 'link'} --seen {tmp_path / 'seen'} {tmp_path / 's.py'} 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0
    assert (tmp_path / "link").is_symlink() and policyfile.load(tmp_path / "policy.toml").syscalls and (tmp_path / "seen").stat().st_size


# ---------------------------------------------------------------- why


def report(source: str, **options: object) -> nsjail_py.Result:
    return nsjail_py.run_python(source, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "options", "line"),
    [
        ("import os\nos.fork()", {}, '"@processes"]'),
        ("import os\nos.execv('/bin/true', ['true'])", {}, "exec = true"),
        ("import socket\nsocket.socket()", {}, '"@inet-sockets"]'),
        ("import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)", {}, '"ptrace"]'),
        ("while True: pass", {"cpu_time": 0.3}, 'cpu_time = "600ms"'),
        ("x = bytearray(200 << 20)", {"memory": "64M"}, 'memory = "128M"'),
        ("print('x' * 100000)", {"output": "1K"}, 'output = "2K"'),
        ("open('/tmp/x', 'wb').write(bytes(2 << 20))", {"disk": "1M"}, 'disk = "2M"'),
        ("import numpy", {}, 'imports = ["numpy"]'),
        ("open('/etc/debian_version')", {}, 'source = "/etc/debian_version"'),
        ("open('/usr/x', 'w')", {}, 'source = "/usr"'),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_each_denial_has_its_line_and_its_risk(source: str, options: dict[str, object], line: str) -> None:
    found = why.why(report(source, **options))
    assert any(line in text for one in found for way in one.ways for text in way.lines), found
    assert all(way.risk for one in found for way in one.ways)


def test_an_argument_that_no_policy_allows_has_no_line() -> None:
    [found] = why.why(report("import os\nopen('f', 'w')\ntry: os.chmod('f', 0o4755)\nexcept OSError: pass"))
    assert found.ways == () and "set-user-id" in found.why


def test_every_call_that_can_be_denied_has_a_line_that_allows_it_or_none_at_all() -> None:
    policy = policyfile.load("untrusted")
    assert policy.syscalls
    names = {syscalls.name_of(number) for number in range(450)}
    for name in sorted(name for name in names if name not in syscalls.calls_of(policy.syscalls) and not name.startswith("syscall ")):
        [found] = why.why({"verdict": "ok", "denied": {name: 1}, "evidence": {}}, policy)
        for way in found.ways:
            assert way.risk
            if way.lines[1].startswith("allow"):
                added = Syscalls(allow=tuple(json.loads(way.lines[1].partition(" = ")[2])), exec=policy.syscalls.exec)
                assert name in syscalls.calls_of(added), name


def test_nothing_that_a_program_says_reaches_the_terminal_raw(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m\x85"
    path.touch()
    said = f"OSError: [Errno 30] Read-only file system: '{path}'\nFileNotFoundError: [Errno 2] No such file or directory: '{path}'"
    found = why.why({"verdict": "ok", "denied": {"syscall \x1b[2J\n": 1}, "evidence": {}, "stderr": said})
    assert len(found) == 3 and all(line.isprintable() for line in why.text(found).split("\n"))


def test_every_set_has_a_risk() -> None:
    assert set(why.SET_RISKS) == set(syscalls.sets())


def test_the_command_explains_a_report_and_refuses_what_is_none(cli: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import os\nos.fork()")
    subprocess.run(
        [*cli, "run", "--report", str(tmp_path / "r.json"), str(tmp_path / "s.py")], capture_output=True, timeout=60 * PATIENCE, check=False
    )
    done = subprocess.run([*cli, "why", str(tmp_path / "r.json")], capture_output=True, timeout=60 * PATIENCE, check=False)
    assert done.returncode == 1 and b"@processes" in done.stdout and b"risk: " in done.stdout
    done = subprocess.run([*cli, "why", "--json", str(tmp_path / "r.json")], capture_output=True, timeout=60 * PATIENCE, check=False)
    assert json.loads(done.stdout)["denials"][0]["what"] == "clone"
    for data in (
        "",
        "[]",
        "{}",
        '{"verdict": "ok", "denied": 3, "evidence": {}}',
        '{"verdict": "ok", "denied": {"fork": 1e999}, "evidence": {}}',
        "[" * 100000,
        '{"verdict": "x", "denied": {}, "evidence": {}}',
    ):
        (tmp_path / "r.json").write_text(data)
        done = subprocess.run([*cli, "why", str(tmp_path / "r.json")], capture_output=True, timeout=60 * PATIENCE, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (125, 1), (data[:20], done.stderr)
