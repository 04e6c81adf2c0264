"""Nothing is left to take: descriptors, processes, memory, disk. Each run is then a right result, or an error that names step, errno and
remedy; nothing is left of it, and as soon as there is enough again the next one works. And clocks that jump move no limit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, importing_ours

import nsjail_py
from nsjail_py import hostinfo

TESTS = Path(__file__).resolve().parent
KERNEL = hostinfo.probe().kernel
HEAD = """
import contextlib, errno, os, resource, sys, time
import nsjail_py
from conftest import PATIENCE, changes, settled, traces
from nsjail_py import Jail, SetupError, launcher

cold, stock, warm = Jail("untrusted", stock=0), Jail("untrusted", stock=2), Jail("untrusted", preload=[], stock=1)
KINDS = {
    "cold": lambda: cold.run(["/bin/echo", "1"], timeout=20 * PATIENCE),
    "script": lambda: cold.run_python("print(1)", timeout=20 * PATIENCE),
    "stock": lambda: stock.run(["/bin/echo", "1"], timeout=20 * PATIENCE),
    "warm": lambda: warm.run_python("print(1)", timeout=20 * PATIENCE),
}
seen = set()

def attempt(kind, errnos):
    try:
        result = KINDS[kind]()
    except SetupError as error:
        seen.add((error.step, errno.errorcode.get(error.errno)))
        assert (error.errno in errnos or error.step in ("lost", "request", "template")) and (error.advice or error.detail), error
    else:
        assert result.ok and result.stdout == b"1\\n", result
        seen.add("ok")

def renew():  # the next warm interpreter is another Jail's
    global warm
    warm.close()
    warm = Jail("untrusted", preload=[], stock=1)

def ends():
    for kind in KINDS:
        assert KINDS[kind]().ok, kind
    warm.close()
    launcher.shutdown()
    now = settled()
    deadline = time.monotonic() + 5 * PATIENCE
    while changes(before, now) and time.monotonic() < deadline:
        now = traces()
    assert not changes(before, now), changes(before, now)
    print(*sorted(map(str, seen)))

before = settled()
for kind in KINDS: KINDS[kind](), KINDS[kind]()
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What other processes build in the common one meanwhile is not what is left here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSJAIL_PY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def program(source: str, *prefix: str, **environment: str) -> str:
    """What a process of its own says that has its limits to itself."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", HEAD + source],
        capture_output=True,
        text=True,
        env=importing_ours() | environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("launcher", ["running", "new"])
def test_a_caller_without_descriptors_gets_a_typed_error(launcher: str) -> None:
    said = program(f"""
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for most in range(3, 34):
    for kind in ["cold", "warm"]:
        if {launcher!r} == "new":
            renew()
            launcher.shutdown()
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        try: attempt(kind, [errno.EMFILE])
        finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
ends()
""")
    """Which step meets the limit first depends on how many a new launcher takes for a moment."""
    assert f"('{'streams' if launcher == 'running' else 'launcher'}', 'EMFILE')" in said and "ok" in said


def test_a_caller_who_may_write_no_files_gets_a_typed_error() -> None:
    """The limit of the size of files holds for those without a name, too, in which a launcher is told what to run."""
    said = program("""
launcher.shutdown()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try: attempt("cold", [errno.EFBIG])
finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
ends()
""")
    assert said == "('request', 'EFBIG')\n"
    said = program("""
launcher.shutdown()
resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, 40 << 10))
try: cold.run_python("#" * 60000)
except SetupError as error: print(error)
""")
    assert said == "lost: File too large; the script is larger than a file may be: raise the hard limit of the size of files (ulimit -Hf)\n"


def test_a_question_to_the_host_that_cannot_be_asked_is_an_error_and_no_answer() -> None:
    """Or a caller who is short of descriptors for a moment would go without control groups to his end."""
    said = program("""
from nsjail_py import hostinfo, scope
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
here = len(os.listdir("/proc/self/fd"))
for most in range(3, 20):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    for ask in (lambda: scope._answer(["/bin/echo", " yes "], {}), lambda: hostinfo.read(hostinfo.Path("/proc/sys/kernel/ostype"))):
        try: seen.add(ask())
        except SetupError as error: seen.add((error.step, errno.errorcode[error.errno]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert len(os.listdir("/proc/self/fd")) == here
seen.add(scope._answer(["/no/such/program"], {})[0])
ends()
""")
    assert said == "('host', 'EMFILE') ('launcher', 'EMFILE') (0, 'yes') 1 Linux\n"


def test_a_root_is_built_whole_or_not_at_all() -> None:
    """What cannot be opened for a moment is not what the host lacks, and the cache would keep it."""
    said = program("""
from nsjail_py import compiled, elf
def built(folder):
    os.environ["NSJAIL_PY_CACHE"] = folder
    for known in (compiled._for_program, elf.cached_libraries): known.cache_clear()
    top = cold.compiled_for("/bin/bash").tree
    return sorted(os.path.relpath(os.path.join(here, name), top) for here, _, names in os.walk(top) for name in names)
cache = os.environ["NSJAIL_PY_CACHE"]
whole, known = built(f"{cache}/whole"), elf.cached_libraries()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for most in range(5, 24):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try: built(f"{cache}/{most}")
    except SetupError as error: seen.add((error.step, errno.errorcode.get(error.errno)))
    try: assert elf.cached_libraries() == known, most
    except OSError as error: seen.add(errno.errorcode[error.errno])
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert built(f"{cache}/{most}") == whole, most
os.environ["NSJAIL_PY_CACHE"] = cache
ends()
""")
    assert said == "('minimal root', 'EMFILE') EMFILE\n"


STARVED = """
held = cold.start(["/bin/cat"], stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE)
assert held.pid
pid = launcher.current().pid
for most in MOST:
    for kind in KINDS:
        soft, hard = resource.prlimit(pid, resource.WHAT)
        resource.prlimit(pid, resource.WHAT, (most, hard))
        attempt(kind, ERRNOS)
        resource.prlimit(pid, resource.WHAT, (soft, hard))
assert launcher.current().pid == pid, "it goes on"
with held: assert held.communicate(b"all the while").check().stdout == b"all the while"
for kind in KINDS: attempt(kind, ERRNOS)  # a jail that was put in stock meanwhile may be one without
ends()
"""


def starved(what: str, most: str, errnos: str) -> str:
    return program(STARVED.replace("WHAT", what).replace("MOST", most).replace("ERRNOS", errnos))


def test_a_launcher_without_descriptors_refuses_a_run_and_keeps_the_others() -> None:
    """A cell that was cloned meanwhile has the limit, too, and does not get its numbers above 1000. Which step meets it depends on how many
    cells are just in stock."""
    said = starved("RLIMIT_NOFILE", "range(3, 160, 6)", "[errno.EMFILE, errno.EINVAL]")
    later = ["('cgroup', 'EMFILE')", "('clone', 'EMFILE')", "('descriptors', 'EINVAL')"]
    refused = ["('request', 'EMFILE')", "('request', None)"]  # the second where it could not even take the channel
    assert any(one in said for one in refused) and any(one in said for one in later)


def test_a_launcher_without_memory_refuses_a_new_plan_and_keeps_the_others() -> None:
    said = program("""
held = cold.start(["/bin/cat"], stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE)
assert held.pid
pid = launcher.current().pid
soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
resource.prlimit(pid, resource.RLIMIT_AS, (0, hard))
KINDS["new"] = Jail("untrusted", stock=0, hostname="new").run
KINDS["new"] = lambda run=KINDS["new"]: run(["/bin/echo", "1"], timeout=20 * PATIENCE)
attempt("new", [errno.ENOMEM])
resource.prlimit(pid, resource.RLIMIT_AS, (soft, hard))
assert launcher.current().pid == pid, "it goes on"
with held: assert held.communicate(b"all the while").check().stdout == b"all the while"
ends()
""")
    assert said == "('plan', 'ENOMEM')\n"


def test_a_caller_without_memory_gets_an_error_and_goes_on() -> None:
    """MemoryError is Python's own word for it."""
    said = program("""
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for more in range(0, 3 << 20, 192 << 10):
    for kind in KINDS:
        resource.setrlimit(resource.RLIMIT_AS, (now + more, -1))
        try:
            with contextlib.suppress(MemoryError): attempt(kind, [errno.ENOMEM, errno.EAGAIN])
        finally: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
ends()
""")
    assert "ok" in said


@pytest.mark.elsewhere(IS_ROOT, why="root's processes are not counted")
def test_a_user_without_processes_gets_a_typed_error() -> None:
    said = starved("RLIMIT_NPROC", "(0, 1)", "[errno.EAGAIN]")
    assert "('clone', 'EAGAIN')" in said
    said = program("""
renew(); launcher.shutdown()
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
attempt("cold", [errno.EAGAIN])
resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
ends()
""")
    assert said == "('launcher', 'EAGAIN')\n"


FULL = """
import subprocess
def mount(*options): subprocess.run(["mount", *options], check=True)
cache = os.environ["NSJAIL_PY_CACHE"]
def empty(kind):
    try: KINDS[kind]()
    except SetupError as error:
        assert error.errno == errno.ENOSPC and error.advice, error
        seen.add((error.step, "ENOSPC"))
    left = [name for _, _, names in os.walk(cache) for name in names if name.startswith(".new-")]
    assert not left, left

mount("-t", "tmpfs", "-o", "mode=700,OPTIONS", "none", cache)
for kind in KINDS:
    for module in (nsjail_py.compiled._for_python, nsjail_py.compiled._for_program): module.cache_clear()
    renew()
    empty(kind)
assert seen, "there was room"
mount("-o", "remount,size=500m,nr_inodes=100000", cache)
before["mounts"] = traces()["mounts"]
ends()
"""


@pytest.mark.skipif(not IS_ROOT, reason="a small file system has to be mounted")
@pytest.mark.parametrize("options", ["size=4k", "size=1m", "size=500m,nr_inodes=12"])
def test_a_full_cache_is_a_typed_error_that_leaves_nothing(options: str, tmp_path: Path) -> None:
    said = program(FULL.replace("OPTIONS", options), "unshare", "--mount", NSJAIL_PY_CACHE=str(tmp_path))
    assert "ENOSPC" in said


@pytest.mark.skipif(not IS_ROOT, reason="a small file system has to be mounted")
@pytest.mark.elsewhere(KERNEL < (6, 3, 0), why="a file system in memory cannot be shown with other ids before Linux 6.3")
def test_a_full_work_directory_is_the_programs_affair_and_a_full_output_file_the_callers(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    said = program(
        f"""
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,uid=12345,gid=12345", "none", {str(tmp_path)!r}], check=True)
source = "import sys\\ntry: open('/work/x', 'wb', 0).write(bytes(1 << 20)); open('/work/y', 'wb', 0).write(b'1')\\nexcept OSError as e: sys.exit(e.errno)"
result = Jail("untrusted", workdir={str(tmp_path)!r}, stock=0).run_python(source)
assert result.exit_code == errno.ENOSPC, result
with open({str(tmp_path / "out")!r}, "wb") as full:
    try:
        cold.run_python("print('text')", stdout=full)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("what was written is lost")
os.unlink({str(tmp_path / "x")!r})
subprocess.run(["umount", {str(tmp_path)!r}], check=True)
ends()
""",
        "unshare",
        "--mount",
    )
    assert said == "\n"


LIMITED = """
result = Jail("untrusted", wall_time=0.6, stock=0).run_python("import time; time.sleep(20)")
assert result.verdict == "wall_time" and 0.55 < result.wall_time < 3 * PATIENCE, result
result = Jail("untrusted", cpu_time=0.3, wall_time=30 * PATIENCE, stock=0).run_python("while True: pass")
assert result.verdict == "cpu_time", result
result = Jail("untrusted", wall_time=5 * PATIENCE, stock=0).run_python("import time; time.sleep(0.3)").check()
assert 0.25 < result.wall_time < 4 * PATIENCE and 0 < result.setup_time < 4 * PATIENCE, result
job = warm.run_python("import time; time.sleep(0.3)").check()
assert 0.25 < job.wall_time < 4 * PATIENCE and 0 <= job.setup_time < 4 * PATIENCE, job
ends()
"""


def test_a_wall_clock_that_jumps_moves_no_limit(tmp_path: Path) -> None:
    """In the caller; that the launcher never asks for it, test_faults.py sees."""
    shim = tmp_path / "jump.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, TESTS / "faults" / "jump.c"], check=True)
    assert (
        "jumps"
        in subprocess.run(
            [sys.executable, "-c", "import time; print('jumps' if abs(time.time() - time.time()) > 1000 else '')"],
            env={"LD_PRELOAD": str(shim)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    program(LIMITED, LD_PRELOAD=str(shim))


@pytest.mark.skipif(not IS_ROOT, reason="only root can shift them")
def test_a_host_whose_other_clocks_are_shifted_has_the_same_limits() -> None:
    """And callers there take none of ours for dead, though processes seem to have started at other times."""
    groups = nsjail_py.launcher.current().claim.directories.values()
    program(LIMITED, "unshare", "--time", "--fork", "--monotonic", "864000", "--boottime", "864000")
    assert all(map(Path.exists, groups))


def test_descriptors_that_a_program_keeps_on_their_way_cost_its_caller_no_run() -> None:
    """As an ordinary user they are of one user, and the kernel refuses whoever is above its own soft limit of open files."""
    said = program("""
keep = '''
import socket, sys
pairs = [socket.socketpair() for _ in range(2)]
for ours, _ in pairs: socket.send_fds(ours, [b"x"], [0] * 250)
print("sent", flush=True)
sys.stdin.read()
'''
limits = (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
with cold.start_python(keep, stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE) as process:
    assert process.stdout.readline() == b"sent\\n"
    for kind in KINDS: attempt(kind, [])
assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
ends()
""")
    assert said == "ok\n"
