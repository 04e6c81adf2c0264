"""The four holes that the project began with, at each level: the attack, what closes it, and the honest program beside it.

What a level does not close, it says so here, too: `trusted` is a seat belt (policies/trusted.toml).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import IS_ROOT

import nsjail_py

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# 1. The environment leaks secrets.


def test_no_variable_of_the_caller_is_seen(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    attack = "import os; print(dict(os.environ)); print([open(f'/proc/{p}/environ').read() for p in ('self', 'thread-self')])"
    assert b"s3cret" in subprocess.run([sys.executable, "-c", attack], capture_output=True, check=False).stdout  # it works outside
    result = nsjail_py.run_python(attack, policy=level).check()
    assert b"s3cret" not in result.stdout and b"API_KEY" not in result.stdout


def test_init_shows_neither_environment_nor_memory(level: str) -> None:
    source = "for f in ('environ', 'mem', 'maps', 'root', 'exe', 'fd'):\n  try: open('/proc/1/' + f, 'rb').read(1); print('read', f)\n  except OSError: pass"
    assert nsjail_py.run_python(source, policy=level).check().stdout == b""


def test_no_process_of_the_host_is_seen(level: str) -> None:
    result = nsjail_py.run_python("import os; print([p for p in os.listdir('/proc') if p.isdigit()])", policy=level).check()
    assert len(eval(result.stdout)) <= 2


def test_a_variable_that_the_policy_names_is_there(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ_HINT", "UTC")
    result = nsjail_py.run_python(
        "import os; print(os.environ['TZ_HINT'], os.environ['MODE'])", policy=level, env_pass=("TZ_HINT",), env={"MODE": "x"}
    )
    assert result.stdout == b"UTC x\n"


# 2. System commands.

SHELL = "import os; print(os.system('/bin/sh -c \"echo pwned\"'))"
RAW_EXEC = "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"pwned\")'])"


def test_no_shell_is_there_to_be_called() -> None:
    for level in ("moderate", "untrusted"):
        assert b"pwned" not in nsjail_py.run_python(SHELL, policy=level).stdout
    assert b"pwned" in nsjail_py.run_python(SHELL, policy="trusted").stdout  # which does not claim to


def test_nothing_can_be_executed_once_the_interpreter_runs() -> None:
    result = nsjail_py.run_python(RAW_EXEC)
    assert b"pwned" not in result.stdout and b"PermissionError" in result.stderr and result.denied == {"execve": 1}
    assert b"pwned" in nsjail_py.run_python(RAW_EXEC, policy="moderate").stdout


def test_a_program_that_it_wrote_itself_cannot_be_executed() -> None:
    source = "import os, shutil, sys\nshutil.copy(sys.executable, '/work/p'); os.chmod('/work/p', 0o755)\nos.execv('/work/p', ['p', '-c', 'print(1)'])"
    assert b"Permission" in nsjail_py.run_python(source).stderr
    from msgspec.structs import replace

    for alone in ({"landlock": False, "syscalls": None}, {"exec_in_writable": True, "landlock": True}):  # noexec alone; the rest alone
        result = nsjail_py.run_python(source, policy=replace(nsjail_py.policy("untrusted"), **alone))
        assert (b"Permission" in result.stderr) is (alone.get("exec_in_writable") is None or bool(result.denied))


# 3. Arbitrary imports.


def test_what_is_not_listed_is_not_there_to_import() -> None:
    source = "import importlib\nfor m in ('numpy', 'msgspec', 'pytest'):\n  try: importlib.import_module(m); print(m)\n  except ImportError: pass"
    for level in ("moderate", "untrusted"):
        assert nsjail_py.run_python(source, policy=level).check().stdout == b""


def test_a_dangerous_module_reaches_nothing() -> None:
    source = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, call in {"socket": (2, 1, 0), "ptrace": (0, 0, 0, 0), "mount": (b"x", b"/work", b"tmpfs", 0, None), "unshare": (0x10000000,), "setns": (0, 0)}.items():
    print(name, getattr(libc, name)(*call), errno.errorcode[ctypes.get_errno()])
"""
    result = nsjail_py.run_python(source).check()
    assert [line.split()[1:] for line in result.stdout.decode().splitlines()] == [["-1", "EPERM"]] * 5, result.stdout


def test_the_network_is_empty() -> None:
    """A server of this test is reached from outside, and not from inside; loopback inside works for the programs inside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()
        source = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {port})), socket.socket().connect_ex(('192.0.2.1', 9)))"
        result = nsjail_py.run_python(source, policy="moderate").check()
    assert result.stdout.split() == [str(errno.ECONNREFUSED).encode(), str(errno.ENETUNREACH).encode()]
    own = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname(), 5); print('met')"
    assert nsjail_py.run_python(own, policy="moderate").check().stdout == b"met\n"


def test_the_standard_library_works(level: str) -> None:
    source = "import json, sqlite3, decimal, re, threading, ssl, ctypes, tempfile; print(sqlite3.connect(':memory:').execute('select 6*7').fetchone()[0])"
    assert nsjail_py.run_python(source, policy=level).check().stdout == b"42\n"


# 4. Built-ins.


def test_open_reaches_no_file_of_the_host(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("canary")
    canary.chmod(0o644)
    tries = [str(canary), f"/proc/self/root{canary}", f"/proc/1/root{canary}", f"/work/../..{canary}", f"/proc/self/cwd/../..{canary}"]
    source = f"for p in {tries!r}:\n  try: print(open(p).read())\n  except OSError: pass"
    for level in ("moderate", "untrusted"):
        assert nsjail_py.run_python(source, policy=level).check().stdout == b""
        assert canary.read_text() == "canary"


def test_nothing_outside_the_private_directories_can_be_written(level: str) -> None:
    source = """
import os
written = []
for top, folders, files in os.walk('/'):
    if top.startswith(('/proc', '/sys')): folders.clear(); continue
    try: open(os.path.join(top, 'x'), 'w').close(); written.append(top)
    except OSError: pass
    if top.count('/') > 2: folders.clear()
print([w for w in written if not w.startswith(('/work', '/tmp', '/dev/shm', '/app'))])
"""
    assert nsjail_py.run_python(source, policy=level).check().stdout == b"[]\n"


def test_the_program_has_a_user_of_its_own_and_no_right(level: str) -> None:
    source = "import os; s = open('/proc/self/status').read(); print(os.getuid(), [l for l in s.splitlines() if l[:3] == 'Cap' or l[:5] == 'NoNew'])"
    uid, _, rest = nsjail_py.run_python(source, policy=level).check().stdout.decode().partition(" ")
    assert uid == "1000" and [line.split()[1] for line in eval(rest)] == ["0" * 16] * 5 + ["1"]
    process = nsjail_py.Jail(level).start_python("import time; time.sleep(30)")
    owner = os.stat(f"/proc/{process.pid}").st_uid
    process.kill()
    process.wait()
    assert owner >= 1_900_000_000 if IS_ROOT else owner == os.getuid()


def test_no_user_namespace_can_be_made_inside(level: str) -> None:
    source = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))"
    assert nsjail_py.run_python(source, policy=level).check().stdout == b"-1\n"


def test_open_works_for_the_honest_program(level: str) -> None:
    source = "open('a', 'w').write('x'); import tempfile; tempfile.TemporaryFile().write(b'y'); print(open('/work/a').read(), open('/dev/urandom', 'rb').read(1) != b'')"
    assert nsjail_py.run_python(source, policy=level).check().stdout == b"x True\n"
