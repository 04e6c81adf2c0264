"""Telemetry of the interpreter's own (PEP 578): what an honest program did is told, what a hostile one leaves is survived, and with the hook
defeated the kernel refuses as before."""

from __future__ import annotations

import os
import runpy
import sys

import pytest
from conftest import ROOT

import nsjail_py
from nsjail_py._native import ffi, lib
from nsjail_py.layers import audit


def run(source: str, how: str = "report", **options: object) -> nsjail_py.Result:
    return nsjail_py.run_python(source, audit=how, **options)  # type: ignore[arg-type]


def told(result: nsjail_py.Result) -> audit.Audit:
    assert result.audit is not None
    return result.audit


def test_imports_files_sockets_and_processes_are_told() -> None:
    result = run("""
import json, os, socket, subprocess
open('/work/x', 'w').close()
for attempt in (lambda: socket.socket(), lambda: os.system('id'), lambda: subprocess.run(['/bin/true'])):
    try: attempt()
    except OSError: pass
""")
    seen = told(result.check())
    assert {"json", "socket", "subprocess"} <= set(seen.imports) and "/work/x" in seen.files
    assert any(one.startswith("socket.__new__") for one in seen.sockets)
    assert {"os.system id", "subprocess.Popen /bin/true"} <= set(seen.processes)
    assert seen.counts["processes"] >= 2 and not seen.cut
    assert result.to_dict()["audit"]["files"] == seen.files


def test_without_the_field_nothing_is_told() -> None:
    assert nsjail_py.run_python("print(1)").audit is None


@pytest.mark.parametrize("source", ["os.system('id')", "__import__('subprocess').run(['/bin/true'])", "__import__('socket').socket()"])
def test_a_refusal_names_the_line_to_change(source: str) -> None:
    result = run(f"import os\n{source}", "refuse")
    assert b"PermissionError: " in result.stderr and b"[syscalls] allow = [..., " in result.stderr
    assert result.denied == {}  # it never came as far as the kernel


def test_what_the_policy_has_is_not_refused() -> None:
    assert run("import socket\nsocket.socketpair(); import os; os.system('true')", "refuse", policy="moderate").ok


def test_a_script_starts_as_without_the_hook() -> None:
    source = (
        "import sys\nprint(sys.argv, __name__, __file__, sys.path[0], sorted(n for n in globals() if n[0] != '_'), sys.orig_argv[1:])\n1/0"
    )
    plain, audited = (nsjail_py.run_python(source, args=["a"], audit=how) for how in ("off", "report"))
    assert (plain.stdout, plain.stderr, plain.exit_code) == (audited.stdout, audited.stderr, audited.exit_code)
    for end in ("raise SystemExit(7)", "import sys; sys.exit('words')", "x = (", "import os; os._exit(5)"):
        plain, audited = (nsjail_py.run_python(end, audit=how) for how in ("off", "report"))
        assert (plain.exit_code, plain.stdout) == (audited.exit_code, audited.stdout), end
        assert plain.stderr.splitlines()[-1:] == audited.stderr.splitlines()[-1:]


def test_children_tell_too() -> None:
    source = (
        "import os\nif os.fork() == 0:\n    open('/work/from-the-child', 'w'); os._exit(0)\nos.wait()\nopen('/work/from-the-parent', 'w')"
    )
    assert {"/work/from-the-child", "/work/from-the-parent"} <= set(told(run(source, policy="moderate").check()).files)


def test_a_flood_is_cut_and_counted() -> None:
    seen = told(run("for n in range(20000):\n  try: open(f'/work/{n}-' + 'x' * 200)\n  except OSError: pass").check())
    assert seen.cut and seen.counts["files"] >= 20000 and len(seen.files) < 2000


FORGED = """
import ctypes, re
start, end = next((int(a, 16), int(b, 16)) for a, b in re.findall(r'([0-9a-f]+)-([0-9a-f]+) rw-s .*memfd:audit', open('/proc/self/maps').read()))
ctypes.memset(start, {byte}, end - start)
"""


@pytest.mark.parametrize("byte", [0, 1, 0x41, 0xFF])
def test_what_the_payload_writes_over_it_is_survived(byte: int) -> None:
    assert told(run(FORGED.format(byte=byte)).check()).cut


def test_any_bytes_can_be_read() -> None:
    for seed in range(50):
        data = bytearray(os.urandom(audit.SIZE) if seed else b"\xff" * audit.SIZE)
        page = ffi.from_buffer("struct audit *", data)
        page.used = [0, 5, lib.AUDIT_ROOM, 2**32 - 1][seed % 4]
        found = audit.parse(bytes(data))
        assert sum(map(len, (found.imports, found.files, found.sockets))) <= audit.MOST_RECORDS


BYPASSES = {
    "a module that is loaded already": ("import sys\nprint(sys.modules['posix'].getpid() > 0)", b"True"),
    "_posixsubprocess, which raises no event": (
        "import _posixsubprocess as p, os\nr, w = os.pipe()\n"
        "try: print(p.fork_exec([b'/bin/true'], [b'/bin/true'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w, False, False, 0, None, None, None, -1, None"
        f"{', False' if sys.version_info < (3, 14) else ''}))\n"
        "except OSError as error: print('refused', error.errno)",
        b"refused 1",
    ),
    "ctypes, which makes the page writable": (
        "import ctypes, re\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for line in open('/proc/self/maps'):\n"
        "    m = re.match(r'([0-9a-f]+)-([0-9a-f]+) r--p 0+ 00:00 0 *$', line)\n"
        "    if m:\n"
        "        start, end = int(m[1], 16), int(m[2], 16)\n"
        "        if b'the policy has no' in ctypes.string_at(start, end - start):\n"
        "            print('defeated', libc.mprotect(ctypes.c_void_p(start), end - start, 3)); ctypes.memset(start, 0, 4)\n"
        "import os\n"
        "try: os.fork(); print('forked')\n"
        "except OSError as error: print('refused', error.errno)",
        b"defeated 0\nrefused 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BYPASSES)
def test_with_the_hook_defeated_the_kernel_refuses_as_before(name: str) -> None:
    source, expected = BYPASSES[name]
    result = run(source, "refuse")
    assert result.stdout.strip() == expected, (result.stdout, result.stderr)
    if b"refused" in expected:
        assert result.denied and b"the policy has no" not in result.stderr


def test_the_hook_s_policy_cannot_be_set_twice() -> None:
    source = "import _imp\nfrom _frozen_importlib import ModuleSpec\nm = _imp.create_dynamic(ModuleSpec('_audit', None, origin='/.audit.so'))\n_imp.exec_dynamic(m)\nm.install(0, {})"
    assert b"RuntimeError: the hook is there already" in run(source).stderr


def test_a_warm_interpreter_says_that_it_has_none() -> None:
    with pytest.raises(nsjail_py.PolicyError, match="warm interpreter"):
        nsjail_py.Jail(preload=[], audit="report")


def test_the_benchmark_of_the_hook_compares_numpy_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = runpy.run_path(str(ROOT / "benchmarks" / "audit.py"))
    assert -0.9 < bench["cost"](bench["measure"](2)) < 9  # ./dev bench says how much it is: a loaded machine cannot


def test_a_run_with_telemetry_leaves_nothing(leaves_nothing: None) -> None:
    run("print(1)").check()


def test_a_session_or_an_executor_that_would_tell_nothing_is_refused() -> None:
    with nsjail_py.Jail("untrusted", audit="report") as jail, pytest.raises(nsjail_py.PolicyError, match=r"\$\.python\.audit"):
        jail.session()
    with pytest.raises(nsjail_py.PolicyError, match=r"\$\.python\.audit"):
        nsjail_py.JailExecutor("untrusted", audit="report")


def test_the_page_is_no_program() -> None:
    page = audit.Page(nsjail_py.Policy())
    assert os.stat(page.fd).st_mode & 0o111 == 0
