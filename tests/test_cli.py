"""The command, as a shell sees it: streams and status pass through, and one line says what went wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import IS_ROOT, PATIENCE, ROOT

import nsjail_py
from nsjail_py.options import bind as split
from nsjail_py.relay import writer

Cli = list[str]


def call(cli: Cli, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*cli, *args], capture_output=True, timeout=60 * PATIENCE, **{"stdin": subprocess.DEVNULL, **options})  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "hello.py"
    path.write_text(
        "import sys\nprint('hello', sys.argv[1:])\nprint('err', file=sys.stderr)\nsys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)\n"
    )
    return path


def test_run_passes_arguments_streams_and_status(cli: Cli, script: Path) -> None:
    done = call(cli, "run", str(script), "3", "--memory", "x")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"hello ['3', '--memory', 'x']\n", b"err\n")


def test_a_script_comes_from_standard_input(cli: Cli) -> None:
    done = call(cli, "run", "-", stdin=None, input=b"print('from stdin')")
    assert (done.returncode, done.stdout) == (0, b"from stdin\n")


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--workdir", "LOOP", "SCRIPT"],
        ["run", "--project", "LOOP", "SCRIPT"],
        ["run", "--bind", "LOOP:/data", "SCRIPT"],
        ["run", "LOOP"],
        ["learn", "--project", "LOOP", "SCRIPT"],
        ["systemd", "unit", "LOOP", "--", "/bin/true"],
    ],
    ids=lambda words: "-".join(words).lower(),
)
def test_a_link_to_itself_is_an_error_of_one_line(command: list[str], cli: Cli, script: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    done = call(cli, *(word.replace("LOOP", str(loop)).replace("SCRIPT", str(script)) for word in command))
    assert done.returncode == 125 and done.stderr.endswith(b"Too many levels of symbolic links\n") and done.stderr.count(b"\n") == 1


def test_exec_is_a_filter_for_any_bytes(cli: Cli) -> None:
    data = bytes(range(256)) * 4096
    done = call(cli, "exec", "--", "/bin/cat", stdin=None, input=data)
    assert done.returncode == 0
    assert done.stdout == data


def test_all_streams_flow_at_once(cli: Cli, tmp_path: Path) -> None:
    # More comes out than goes in: who only writes, or only reads, would wait for ever.
    (tmp_path / "data").write_bytes(os.urandom(1 << 20))
    source = "import sys\nfor block in iter(lambda: sys.stdin.buffer.read1(1000), b''):\n"
    source += "    sys.stdout.buffer.write(block * 4); sys.stderr.buffer.write(block)\n"
    (tmp_path / "s.py").write_text(source)
    with open(tmp_path / "data", "rb") as data:
        done = call(cli, "run", str(tmp_path / "s.py"), stdin=data)
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 4 << 20, 1 << 20)


def test_standard_input_can_be_a_file_in_json_too(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("from a file")
    for options in ([], ["--json"]):
        done = call(cli, "exec", *options, "--stdin", str(tmp_path / "data"), "--", "cat")
        assert (json.loads(done.stdout)["stdout"] if options else done.stdout.decode()) == "from a file"
    with open(tmp_path / "data", "rb") as data:
        assert json.loads(call(cli, "exec", "--json", "--", "cat", stdin=data).stdout)["stdout"] == "from a file"


def test_no_descriptor_of_the_caller_reaches_the_program(cli: Cli, tmp_path: Path) -> None:
    """Neither a terminal, to type into, nor a file or pipe, to open again for writing."""
    (tmp_path / "s.py").write_text(
        "import os; print([(os.fstat(fd).st_mode >> 12, os.isatty(fd), os.fstat(fd).st_ino) for fd in range(3)])"
    )
    (tmp_path / "file").write_text("")
    (terminal, ours), (pipe, end) = os.openpty(), os.pipe()
    for stdin in (ours, pipe, os.open(tmp_path / "file", os.O_RDWR), os.open("/dev/null", os.O_RDWR)):
        outside = os.fstat(stdin).st_ino
        done = call(cli, "run", str(tmp_path / "s.py"), stdin=stdin)
        seen = eval(done.stdout)
        assert [(kind, tty) for kind, tty, _ in seen] == [(1, False)] * 3, done.stderr
        assert outside not in [inode for *_, inode in seen]
        os.close(stdin)
    os.close(terminal)
    os.close(end)


def test_output_beyond_the_limit_is_cut_at_the_limit(cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys, time; print('x' * int(sys.argv[1]), end='', flush=True); time.sleep(int(sys.argv[2]))")
    done = call(cli, "run", "--output", "100", str(script), "101", "20")
    assert (done.returncode, len(done.stdout)) == (124, 100)
    done = call(cli, "run", "--output", "100", str(script), "100", "0")
    assert (done.returncode, len(done.stdout)) == (0, 100)


def test_a_program_that_closes_its_output_is_waited_for(cli: Cli) -> None:
    source = b"import os, time\nos.close(1); os.close(2); time.sleep(0.3); os._exit(9)"
    assert call(cli, "run", "-", stdin=None, input=source).returncode == 9


def test_input_that_nobody_reads_does_not_hold_the_run_up(cli: Cli) -> None:
    with open("/dev/zero", "rb") as endless:
        assert call(cli, "exec", "--", "true", stdin=endless).returncode == 0


def test_exec_finds_programs_as_a_shell_does(cli: Cli) -> None:
    assert call(cli, "exec", "--", "echo", "a b").stdout == b"a b\n"


def test_signals_are_128_and_their_number(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import os; os.kill(os.getpid(), 11)")
    assert call(cli, "run", str(tmp_path / "s.py")).returncode == 128 + 11


@pytest.mark.parametrize(
    ("option", "source", "word"),
    [
        ("--cpu-time=200ms", "while True: pass", b"processor"),
        ("--wall-time=0.2", "import time; time.sleep(60)", b"ran for"),
        ("--output=10K", "while True: print('x' * 100)", b"10240 bytes"),
    ],
)
def test_a_reached_limit_is_124_and_says_which(cli: Cli, option: str, source: str, word: bytes) -> None:
    done = call(cli, "run", option, "-", stdin=None, input=source.encode())
    assert done.returncode == 124
    assert word in done.stderr.splitlines()[-1]


def test_what_cannot_be_executed_is_126_and_what_is_missing_127(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    for path, status in ((str(tmp_path / "plain"), 126), (str(tmp_path), 126), ("/nonexistent", 127), ("nonexistent-program", 127)):
        done = call(cli, "exec", "--", path)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), path


@pytest.mark.parametrize(
    "args",
    [
        ("run", "/nonexistent.py"),
        ("run", "/tmp"),
        ("run", "--policy", "untrused", "-"),
        ("run", "--policy", "/nonexistent.toml", "-"),
        ("run", "--memory", "lots", "-"),
        ("run", "--memory", "-1", "-"),
        ("run", "--cpu-time", "nan", "-"),
        ("run", "--processes", "0", "-"),
        ("run", "--bind", "/nonexistent:/x", "-"),
        ("run", "--bind", "/usr:/a:rw:x", "-"),
        ("run", "--bind", "/usr:/a", "--bind", "/etc:/a", "-"),
        ("run", "--bind", "/usr:/proc/x", "-"),
        ("run", "--import", "no-such-distribution", "-"),
        ("run", "--python", "/bin/cat", "-"),
        ("run", "--python", "/nonexistent", "-"),
        ("run", "--stdin", "/nonexistent", "-"),
        ("run", "--workdir", "/nonexistent", "-"),
        ("run", "--workdir", "", "-"),
        ("run", "--project", "", "-"),
        ("run", "--env", "=x", "-"),
        ("run", "--root", "/nonexistent", "-"),
        ("run", "--stdin", "/etc", "-"),
        ("run", "--memroy", "1G", "-"),
        ("run", "--mem", "1G", "-"),
        ("run", "--processes", "many", "-"),
        ("run", "--report", "/nonexistent/report", "-"),
        ("run", "/dev/zero"),
        ("run",),
        ("policy", "show", "untrused"),
        ("policy", "show", "/etc"),
        ("policy", "explain", "untrused"),
        ("rum",),
        ("exec",),
        ("exec", "--"),
    ],
    ids=" ".join,
)
def test_bad_input_is_125_with_one_line_and_no_traceback(cli: Cli, args: tuple[str, ...]) -> None:
    done = call(cli, *args)
    assert done.returncode == 125
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "learn"])
def test_only_what_has_to_be_there_is_required(command: str, cli: Cli) -> None:
    said = f"nsjail-py: the following arguments are required: SCRIPT (see nsjail-py {command} --help)\n"
    assert call(cli, command).stderr.decode() == said


@pytest.mark.parametrize("command", ["run", "policy check", "learn", "scan"])
def test_what_a_command_does_not_know_is_looked_up_in_its_own_help(command: str, cli: Cli) -> None:
    done = call(cli, *command.split(), "--unknown", "x")
    assert done.stderr.decode() == f"nsjail-py: unrecognized arguments: --unknown (see nsjail-py {command} --help)\n"


def test_the_version_is_told(cli: Cli) -> None:
    assert call(cli, "--version").stdout.decode() == f"nsjail-py {nsjail_py.__version__}\n"
    assert b"--version" in call(cli, "--help").stdout


@pytest.mark.parametrize("command", [["run", "--project"], ["learn", "--project"], ["run", "--workdir"]], ids=" ".join)
def test_a_file_in_the_place_of_a_directory_is_an_error(command: list[str], cli: Cli, script: Path) -> None:
    done = call(cli, *command, str(script), str(script))
    assert done.returncode == 125 and f"{str(script)!r} is not a directory".encode() in done.stderr


FAULTY = {
    "no TOML": ("a = [", "is not TOML"),
    "a circle": ('extends = "./p.toml"', "circle"),
    "a wrong type": ('extends = "untrusted"\nlimits = 3', "$.limits"),
    "an unknown field": ('extends = "untrusted"\nhostnam = "x"', "hostname"),
}


@pytest.mark.parametrize(("text", "says"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_policy_file_is_125_with_one_line(cli: Cli, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    done = call(cli, "run", "--policy", str(tmp_path / "p.toml"), "-", stdin=None, input=b"print(1)")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, b"", 1)
    assert says in done.stderr.decode() and "p.toml" in done.stderr.decode()


@pytest.mark.elsewhere(IS_ROOT, why="root can read every file, and lacks nothing that a policy could require")
def test_what_an_ordinary_user_cannot_read_or_have_is_125_with_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.py").touch(mode=0o000)
    done = call(cli, "run", str(tmp_path / "s.py"))
    assert (done.returncode, len(done.stderr.splitlines())) == (125, 1) and b"Permission denied" in done.stderr
    (tmp_path / "p.toml").write_text('extends = "untrusted"\nbest_effort = []')
    done = call(cli, "exec", "--policy", str(tmp_path / "p.toml"), "--", "true")
    assert (done.returncode, len(done.stderr.splitlines())) == (125, 1)
    assert b"own_uid: only root can" in done.stderr and b"best_effort" in done.stderr


def test_an_argument_list_that_the_kernel_refuses_is_126_with_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('extends = "untrusted"\n[limits]\nstack = "1M"')  # which a quarter of may be arguments
    for command in (
        ["exec", "--policy", str(tmp_path / "p.toml"), "--", "true"],
        ["run", "--policy", str(tmp_path / "p.toml"), "/dev/null"],
    ):
        done = call(cli, *command, *["x" * 100_000] * 3)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (126, b"", 1), done.stderr
        assert b"Argument list too long" in done.stderr


def test_a_killed_launcher_is_125_with_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    command = [*cli, "run", str(tmp_path / "long.py")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        (launcher,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(launcher), signal.SIGKILL)
        said = process.communicate(timeout=10 * PATIENCE)[1]
    assert process.returncode == 125 and len(said.splitlines()) == 1 and b"launcher ended" in said


def test_json_holds_the_result_and_says_how_output_is_written(cli: Cli, script: Path) -> None:
    record = json.loads(call(cli, "run", "--json", str(script), "5").stdout)
    assert (record["verdict"], record["exit_code"], record["stdout"], record["stdout_encoding"]) == ("exit", 5, "hello ['5']\n", "utf-8")
    record = json.loads(call(cli, "exec", "--json", "--", "printf", r"\377").stdout)
    assert (record["stdout"], record["stdout_encoding"]) == ("/w==", "base64")


def test_report_is_written_when_the_program_fails_too(cli: Cli, script: Path, tmp_path: Path) -> None:
    assert call(cli, "run", "--report", str(tmp_path / "r.json"), str(script), "4").returncode == 4
    assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == 4


def test_a_report_is_what_it_was_when_no_jail_is_made(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        assert call(cli, "exec", "--report", str(tmp_path / name), "--workdir", "/nonexistent", "--", "true").returncode == 125
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "old")]


def test_a_report_goes_through_links_and_into_pipes_and_leaves_both(cli: Cli, script: Path, tmp_path: Path) -> None:
    (tmp_path / "target.json").write_text("an older and much longer report" * 1000)
    (tmp_path / "link.json").symlink_to("target.json")
    assert call(cli, "run", "--report", str(tmp_path / "link.json"), str(script)).returncode == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "target.json").read_text())["verdict"] == "ok"
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert call(cli, "run", "--report", str(tmp_path / "fifo"), str(script)).returncode == 0
    assert json.loads(os.read(reader, 1 << 16))["verdict"] == "ok" and (tmp_path / "fifo").is_fifo()
    os.close(reader)


def test_a_report_on_standard_output_follows_what_the_program_wrote(cli: Cli, script: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([*cli, "run", "--report", "/dev/stdout", str(script)], stdout=out, stderr=subprocess.DEVNULL, check=True)
    said, report = (tmp_path / "out").read_text().split("\n", 1)
    assert said == "hello []" and json.loads(report)["exit_code"] == done.returncode == 0


def test_an_error_of_writing_names_what_was_to_be_written(cli: Cli, tmp_path: Path) -> None:
    command = f"ulimit -f 0; exec {' '.join(cli)} policy list > {tmp_path / 'out'}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert (done.returncode, done.stderr) == (125, b"nsjail-py: standard output: File too large\n")
    with open(os.devnull, "rb") as nothing, pytest.raises(OSError, match="'the report'"):
        writer(nothing.fileno(), "the report")(b"x")


def test_bind_project_and_workdir_show_what_they_say(cli: Cli, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # inside, another user reads it
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "data").write_text("data")
    (tmp_path / "helper.py").write_text("VALUE = 'helped'")
    (tmp_path / "out").mkdir()
    source = "import helper; print(helper.VALUE, open('/data/data').read()); open('new', 'w').write('kept')"
    bind = str(tmp_path / "a:b").replace(":", "\\:") + ":/data"
    options = ["--bind", bind, "--project", str(tmp_path), "--workdir", str(tmp_path / "out")]
    done = call(cli, "run", *options, "-", stdin=None, input=source.encode())
    assert (done.returncode, done.stdout) == (0, b"helped data\n"), done.stderr
    assert (tmp_path / "out" / "new").read_text() == "kept"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"/a", ("/a", "/a", False)),
        (r"/a:/b", ("/a", "/b", False)),
        (r"/a:/b:rw", ("/a", "/b", True)),
        (r"/a\:b:/c", ("/a:b", "/c", False)),
        (r"/a\\:/b", ("/a\\", "/b", False)),
        (r"/a\\\:b:/c", ("/a\\:b", "/c", False)),
        (r"/a\b:/c\\:ro", ("/a\\b", "/c\\", False)),
        *((wrong, None) for wrong in ("", ":", "/a:", ":/b", "/a::/b", "/a:/b:x", "/a:/b:rw:", "/a:/b:/c")),
    ],
)
def test_a_bind_is_split_at_the_colons_that_are_not_escaped(text: str, parts: tuple[str, str, bool] | None) -> None:
    if parts:
        assert split(text) == parts
    else:
        with pytest.raises(nsjail_py.PolicyError, match="--bind"):
            split(text)


def test_neighbours_of_a_script_are_not_visible(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("")
    (tmp_path / "s.py").write_text("import secret")
    assert b"ModuleNotFoundError" in call(cli, "run", str(tmp_path / "s.py")).stderr


def test_ctrl_c_and_sigterm_kill_the_jail(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [*cli, "run", str(tmp_path / "long.py")]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None and process.stdout.readline() == b"up\n"  # it takes as long as it takes
            process.send_signal(number)
            assert process.wait(10) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_caller_ignores_ends_nothing(cli: Cli, number: signal.Signals) -> None:
    source = b"import time; print('up', flush=True); time.sleep(0.5); print('end')"
    command = ["/bin/sh", "-c", f"trap '' {number.name[3:]}; exec \"$@\"", "sh", *cli, "run", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(source)
        process.stdin.close()
        assert process.stdout.readline() == b"up\n"
        os.killpg(process.pid, number)
        assert (process.stdout.read(), process.wait(10)) == (b"end\n", 0)


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("exec -- ./x", 127, b"./x: no such program"),
        ("exec --policy own.toml -- true", 125, b"own.toml: cannot be read"),
        ("exec -- true", 125, b"cache directory: No such file or directory (here); set NSJAIL_PY_CACHE to an absolute path"),
    ],
)
def test_where_the_current_directory_is_gone_one_line_says_what_is_missed(
    cli: Cli, command: str, status: int, says: bytes, tmp_path: Path
) -> None:
    script = f"cd {tmp_path} && rmdir {tmp_path} && exec {' '.join(cli)} {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"NSJAIL_PY_CACHE": "here"} if status == 125 else {})
    done = subprocess.run(["/bin/sh", "-c", script], env=environment, capture_output=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1) and says in done.stderr, done.stderr


def test_closed_standard_streams_do_no_harm(cli: Cli, script: Path) -> None:
    command = " ".join([*cli, "run", str(script)])
    assert subprocess.run(["/bin/sh", "-c", f"{command} <&- 2>/dev/null"], capture_output=True, check=False).stdout == b"hello []\n"
    assert subprocess.run(["/bin/sh", "-c", f"{command} >&- 2>&-"], check=False).returncode == 0


def test_a_reader_that_leaves_ends_the_program(cli: Cli) -> None:
    command = " ".join([*cli, "exec", "--output", "1T", "--", "/usr/bin/yes", "| head -1"])
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=30 * PATIENCE, check=False)
    assert done.stdout == b"y\n"


def test_policies_are_listed_shown_checked_and_explained(cli: Cli, tmp_path: Path) -> None:
    assert [line.split()[0] for line in call(cli, "policy", "list").stdout.splitlines()] == [b"moderate", b"trusted", b"untrusted"]
    assert b"extends" in call(cli, "policy", "show", "untrusted").stdout
    assert b"network" in call(cli, "policy", "explain", "untrusted").stdout.lower()
    (tmp_path / "p.toml").write_text('extends = "untrusted"\nmemry = 1\n[limits]\ncpu_time = "fast"\n')
    done = call(cli, "policy", "check", str(tmp_path / "p.toml"))
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    (tmp_path / "p.toml").write_text('extends = "untrusted"\n')
    assert call(cli, "policy", "check", str(tmp_path / "p.toml")).returncode == 0


def test_a_policy_file_changes_what_it_says(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('extends = "untrusted"\n[limits]\nwall_time = "200ms"\n')
    done = call(cli, "run", "--policy", str(tmp_path / "p.toml"), "-", stdin=None, input=b"import time; time.sleep(9)")
    assert done.returncode == 124
    assert b"0.200 s" in done.stderr


def test_help_is_there_for_every_command(cli: Cli) -> None:
    for command in ([], ["run"], ["exec"], ["doctor"], ["policy"]):
        done = call(cli, *command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(b"usage: nsjail-py")


def test_the_environment_of_the_command_does_not_cross(cli: Cli) -> None:
    done = call(cli, "exec", "--env", "A=1", "--env", "PASSED", "--", "env", env={**os.environ, "SECRET": "x", "PASSED": "y"})
    assert b"A=1" in done.stdout
    assert b"PASSED=y" in done.stdout
    assert b"SECRET" not in done.stdout


def test_the_command_loads_nothing_that_a_usual_run_does_not_need() -> None:
    source = (
        "import sys, nsjail_py.cli; nsjail_py.cli.main(['exec', '--', 'true'])\n"
        "asked = {'subprocess'} if 'nsjail_py.scope' in sys.modules else set()\n"  # a user's systemd, for a control group
        "print(({'_hashlib', 'subprocess', 'asyncio', 'pyseccomp', 'tempfile', 'email'} & sys.modules.keys()) - asked)"
    )
    subprocess.run([sys.executable, "-c", source], capture_output=True, check=True)  # the first one fills the cache
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, check=True).stdout == b"set()\n"
