"""Bundles for an installed container runtime, and runs under one."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest
from conftest import IS_ROOT, PATIENCE, ROOT, importing_ours
from container_images import base, entry, layer, layout
from msgspec.structs import replace

import nsjail_py
from nsjail_py import launcher, oci_backend, oci_bundle, oci_image, oci_seccomp, policyfile, rootfs, syscalls
from nsjail_py.policy import Mount, Policy, Syscalls
from nsjail_py.result import Protection
from nsjail_py.streams import Ends

pytestmark = pytest.mark.usefixtures("own_cache")
RUNTIMES = ("crun", "runc", "runsc")
WORKING = tuple(filter(shutil.which, RUNTIMES))

needs_root = pytest.mark.skipif(not IS_ROOT, reason="a bundle's user ids are root's to give")


def under(runtime: str, bundle: Path, state: Path) -> subprocess.CompletedProcess[bytes]:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed: apt install {runtime}")
    command = [runtime, "--root", str(state)]
    if runtime == "runsc":
        command += ["--network=none", "--ignore-cgroups", "--oci-seccomp"]
    name = f"nsjail-test-{os.getpid()}"
    command += ["run", f"--bundle={bundle}", name]
    return subprocess.run([*oci_backend.surroundings(runtime), *command], input=b"", capture_output=True, timeout=120, check=False)


@needs_root
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("level", ["moderate", "untrusted"])
def test_a_bundle_runs_with_the_same_view_and_limits(runtime: str, level: str, place: Path, cli: list[str]) -> None:
    written = subprocess.run(
        [*cli, "bundle", level, str(place / "b"), "--", "/bin/cat", "/proc/self/status", "/proc/self/limits"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert written.returncode == 0, written.stderr
    done = under(runtime, place / "b", place / "state")
    text = done.stdout.decode()
    lines = {line.partition(":")[0]: line.split()[1:] for line in text.splitlines() if ":" in line}
    assert lines["Uid"] == ["1000"] * 4 and lines["CapBnd"] == lines["CapEff"] == ["0" * 16], (done.stderr, text)
    if runtime != "runsc":  # its kernel does not tell
        assert lines["NoNewPrivs"] == ["1"] and lines["Seccomp"] == ["2"]
    limits = policyfile.load(level).limits
    if runtime != "runsc":
        assert f"Max open files            {limits.open_files}" in text
    told = written.stderr.decode()
    assert ("not in the bundle: landlock" in told) is (level == "untrusted")


@needs_root
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bundle_s_filter_and_root_refuse_what_the_policy_refuses(runtime: str, place: Path) -> None:
    policy = replace(policyfile.load("untrusted"), root="system")
    script = "echo x > /usr/x && echo wrote; echo x > /work/x && echo worked; /bin/true"
    oci_bundle.bundle(policy, place / "b", ["/bin/sh", "-c", script], runtime)
    done = under(runtime, place / "b", place / "state")
    assert done.stdout == b"worked\n" and b"Cannot fork" in done.stderr, done


@needs_root
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bundle_of_an_image_has_its_files_at_the_top(runtime: str, place: Path, tmp_path: Path) -> None:
    image = layout(tmp_path / "i", [base(), layer(entry("entry.sh", b"#!/bin/sh\necho ran\n"))])
    oci_bundle.bundle(replace(policyfile.load("moderate"), root=f"oci:{image}"), place / "b", ["/entry.sh"])
    done = under(runtime, place / "b", place / "state")
    assert done.stdout == b"ran\n", done


@needs_root
def test_links_to_one_file_of_an_image_are_links_in_its_bundle_too(tmp_path: Path) -> None:
    links = [entry(name, type=tarfile.LNKTYPE, linkname="top") for name in ("other", "a/first", "a/second", "b/c")]
    image = layout(tmp_path / "i", [base(), layer(entry("top", b"text"), *links, entry("alone", b"text"))])
    oci_bundle.bundle(replace(policyfile.load("moderate"), root=f"oci:{image}"), tmp_path / "b", ["/bin/sh"])
    made = [tmp_path / "b" / "rootfs" / name for name in ("top", "other", "a/first", "a/second", "b/c")]
    assert len({path.stat().st_ino for path in made}) == 1 and {path.read_bytes() for path in made} == {b"text"}
    assert (tmp_path / "b" / "rootfs" / "alone").stat().st_nlink == 1


@needs_root
@pytest.mark.parametrize("name", ["b", "new/b", "old/b", "old"])
def test_a_bundle_that_fails_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(oci_bundle, "_unavailable", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        oci_bundle.bundle("moderate", tmp_path / name, ["/bin/true"])
    assert {path.name for path in tmp_path.rglob("*") if "cache" not in path.parts} == {"old"}


NESTED = """
import os, sys
from pathlib import Path
import nsjail_py
from nsjail_py import oci_bundle
from nsjail_py.policy import Mount
from test_oci_runtime import backend, under

runtime, how, place, writable = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "True"
script = "echo x > /data/sub/evil && echo wrote; while read -r line; do echo $line; done < /proc/self/mountinfo"
data = Mount(source=str(place / "source"), target="/data", executable=False, writable=writable)
mounts = (data, Mount(source="/etc/os-release", target="/file"))
policy, command = backend(runtime, mounts=mounts), ["/bin/sh", "-c", script]
if how == "run":
    done = nsjail_py.run(command, policy=policy)
else:
    oci_bundle.bundle(policy, place / "b", command, runtime if runtime == "runsc" else "")
    done = under(runtime, place / "b", place / "state")
sys.stdout.buffer.write(done.stdout)
sys.stderr.buffer.write(done.stderr)
print("left:", *os.listdir(place / "source" / "sub"))
"""


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
@pytest.mark.parametrize("how", ["run", "bundle"])
@pytest.mark.parametrize("writable", [False, True])
def test_the_options_of_a_mount_hold_for_what_is_mounted_below_its_source(runtime: str, how: str, writable: bool, place: Path) -> None:
    (place / "source" / "sub").mkdir(parents=True)
    mount = f'mount -t tmpfs -o mode=1777 below {place}/source/sub && exec "$@"'
    unshared = ["unshare", "--mount", "--propagation=private", "sh", "-c", mount, "sh"]
    command = [*unshared, sys.executable, "-c", NESTED, runtime, how, str(place), str(writable)]
    done = subprocess.run(command, env=importing_ours(), capture_output=True, text=True, timeout=120, check=False)
    *lines, left = done.stdout.splitlines()
    if not writable:
        assert left == "left:" and "wrote" not in lines and "/data/sub/evil" in done.stderr, done
    if runtime != "runsc":  # to its kernel it is one mount
        options = [set(line.split()[5].split(",")) for line in lines if " /data" in line]
        assert options and all(one >= {"nosuid", "nodev", "noexec"} for one in options), done


def backend(runtime: str, **changes: object) -> Policy:
    base = policyfile.load("untrusted")
    assert base.syscalls
    return replace(base, backend=f"oci:{runtime}", landlock=False, syscalls=replace(base.syscalls, exec=True), **changes)


@needs_root
@pytest.mark.parametrize("how", ["bundle", *WORKING])
@pytest.mark.parametrize("root", ["image", "directory"])
@pytest.mark.parametrize("target", ["/data/in/input.txt", "/data/dir"])
def test_a_link_of_the_root_s_leads_no_target_of_a_mount_onto_the_host(how: str, root: str, target: str, tmp_path: Path) -> None:
    victim, source = tmp_path / "victim", tmp_path / "source"
    victim.mkdir()
    source.mkdir()
    mount = Mount(source=str(source if target == "/data/dir" else ROOT / "LICENSE"), target=target)
    image = f"oci:{layout(tmp_path / 'i', [base(), layer(entry('data', type=tarfile.SYMTYPE, linkname=str(victim)))])}"
    changes = {"root": image if root == "image" else str(oci_image.unpacked(image)), "mounts": (mount,)}
    with pytest.raises(nsjail_py.PolicyError, match=f"mount on {target.removesuffix('/input.txt')}"):
        if how == "bundle":
            oci_bundle.bundle(replace(policyfile.load("moderate"), **changes), tmp_path / "b", ["/bin/sh"])
        else:
            nsjail_py.run(["/bin/sh", "-c", ":"], policy=backend(how, **changes))
    assert os.listdir(victim) == []


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
@pytest.mark.parametrize("single", [True, False], ids=["file", "directory"])
@pytest.mark.parametrize("writable", [True, False])
def test_what_a_mount_has_is_not_executed_where_the_policy_says_so(runtime: str, single: bool, writable: bool, place: Path) -> None:
    (place / "d").mkdir()
    (place / "d" / "f").write_text("#!/bin/sh\necho executed\n")
    (place / "d" / "f").chmod(0o755)
    source, target = (place / "d" / "f", "/data/f") if single else (place / "d", "/data")
    mounts = (Mount(source=str(source), target=target, executable=False, writable=writable),)
    if runtime == "crun" and single and writable:
        with pytest.raises(nsjail_py.Unavailable, match="noexec for a single file"):
            nsjail_py.Jail(backend(runtime, mounts=mounts))
        told = oci_bundle.bundle(replace(policyfile.load("moderate"), mounts=mounts), place / "b", ["/bin/sh"]).unavailable
        assert "noexec" in told
        return
    result = nsjail_py.run(["/bin/sh", "-c", "exec /data/f"], policy=backend(runtime, mounts=mounts))
    assert result.stdout == b"" and b"Permission denied" in result.stderr, result


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_a_run_under_a_runtime_gives_a_result(runtime: str) -> None:
    source = "import sys\nprint(open('/work/x', 'w').write('abc'), sys.stdin.read())\nprint('err', file=sys.stderr)\nsys.exit(3)"
    result = nsjail_py.run_python(source, policy=backend(runtime), input=b"in")
    assert (result.verdict, result.exit_code, result.stdout, result.stderr) == ("exit", 3, b"3 in\n", b"err\n")
    assert result.wall_time > 0 and result.cpu_source == result.memory_source == "unavailable" and result.peak_processes is None
    states = {one.name: one.state for one in result.protections}
    assert states["own_uid"] == states["nested_userns"] == "unavailable" and states["landlock_fs"] == "not requested"
    assert min(result.timeline.values()) >= 0 and result.timeline["run"] == pytest.approx(result.wall_time * 1e6)


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_proc_tells_nothing_of_the_host_s_under_a_runtime_or_the_result_says_so(runtime: str) -> None:
    script = "import os; print(*(name for name in os.listdir('/proc') if not name.isdigit()))"
    result = nsjail_py.run_python(script, policy=backend(runtime)).check()
    state = {one.name: one.state for one in result.protections}["private_proc"]
    told = oci_bundle._unavailable(backend(runtime), runtime)
    if runtime in oci_bundle.OWN_KERNEL:
        assert b"meminfo" in result.stdout and state == "unavailable" and "private_proc" in told
    else:
        native = nsjail_py.run_python(script, policy="untrusted").check()
        assert result.stdout == native.stdout and state == "applied" and "private_proc" not in told


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_what_proc_masks_shows_nothing_under_a_runtime(runtime: str) -> None:
    script = f"""if True:
        import os
        for name in {rootfs.MASKED}:
            try:
                found = os.listdir(f"/proc/{{name}}") if os.path.isdir(f"/proc/{{name}}") else open(f"/proc/{{name}}", "rb").read(1)
            except OSError:
                found = None
            if found:
                print(name, found)
    """
    assert nsjail_py.run_python(script, policy=backend(runtime, proc="masked")).check().stdout == b""


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_limits_and_kills_hold_under_a_runtime(runtime: str) -> None:
    assert nsjail_py.run_python("while True: pass", policy=backend(runtime), wall_time=1.0).verdict == "wall_time"
    assert nsjail_py.run_python("while True: print('x' * 1000)", policy=backend(runtime), output="10K").verdict == "output"
    assert nsjail_py.run_python("x = bytearray(900 << 20)", policy=backend(runtime)).signal == 9
    with nsjail_py.Jail(backend(runtime)).start_python("import time; time.sleep(60)") as process:
        assert process.pid
        process.kill()
        assert process.wait(30).verdict == "killed"


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_a_runtime_gives_away_nothing_that_the_caller_passes(runtime: str, tmp_path: Path) -> None:
    """Some make the container's user the owner of its standard streams, whatever they are."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"text" * 100_000)
    with source.open("rb") as given, target.open("wb") as out:
        nsjail_py.run(["/bin/cat"], policy=backend(runtime), stdin=given, stdout=out, stderr=nsjail_py.STDOUT).check()
        nsjail_py.run(["/bin/true"], policy=backend(runtime), stdin=nsjail_py.DEVNULL, stdout=nsjail_py.DEVNULL).check()
    assert target.read_bytes() == source.read_bytes()
    assert {os.stat(path).st_uid for path in (source, target, os.devnull)} == {0}


PIPED = """
import asyncio, os, subprocess, sys
import nsjail_py
from msgspec import json
from nsjail_py import Policy, aio
read, write = os.pipe()
os.set_blocking(read, False)
size = int(sys.argv[2])
source, to = f"import sys; sys.stdout.write('x' * {size})", {"policy": json.decode(sys.argv[1], type=Policy), "stdout": write}

async def drain():
    taken = 0
    while taken < size:
        await asyncio.sleep(0.01)
        try:
            taken += len(os.read(read, 4096))
        except BlockingIOError:
            pass
    return taken

async def cancelled():
    task = asyncio.create_task(aio.run_python(source, **to))
    await asyncio.sleep(LIMIT)
    task.cancel()
    await task
"""
READ = "asyncio.gather(aio.run_python(source, **to), drain())"
LIMITED = {
    "aio": ("asyncio.wait_for(aio.run_python(source, **to), LIMIT)", "TimeoutError"),
    "aio's own": ("aio.run_python(source, **to, timeout=LIMIT)", "TimeoutError"),
    "cancelled": ("cancelled()", "CancelledError"),
    "a thread": ("asyncio.to_thread(nsjail_py.run_python, source, **to, timeout=LIMIT)", "TimeoutExpired"),
}


def piped(what: str, runtime: str, size: int) -> str:
    """In a process of its own, which a run may keep from ending."""
    main = f"async def main():\n    try:\n        print(await {what})\n    except BaseException as error:\n        print(type(error).__name__)\n"
    source = f"LIMIT = {2 * PATIENCE}\n{PIPED}\n{main}\nasyncio.run(main())"
    policy = msgspec.json.encode(backend(runtime)).decode()
    command = [sys.executable, "-c", source, policy, str(size)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60 * PATIENCE, check=False).stdout


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_the_loop_goes_on_while_one_of_its_tasks_reads_the_pipe_that_output_is_carried_to(runtime: str) -> None:
    said = piped(READ, runtime, 400_000)
    assert "verdict=<Verdict.ok: 'ok'>" in said and said.endswith(", 400000]\n"), said


@needs_root
@pytest.mark.skipif(not WORKING, reason="no runtime is installed: apt install crun")
@pytest.mark.parametrize("size", [300_000, 900_000], ids=["over", "going on"])
@pytest.mark.parametrize("how", LIMITED)
def test_a_pipe_that_nobody_reads_keeps_no_run_beyond_its_timeout(how: str, size: int) -> None:
    what, said = LIMITED[how]
    assert piped(what, WORKING[0], size) == f"{said}\n"


def test_no_stream_of_a_runtime_s_changes_when_it_makes_another_non_blocking() -> None:
    """runsc does, and inside a program that shared them would find its writes refused as soon as the pipe was full."""
    ends = Ends(nsjail_py.DEVNULL, nsjail_py.PIPE, nsjail_py.STDOUT, only_pipes=True)
    _, out, err = ends.inside
    assert os.path.sameopenfile(out, err)
    os.set_blocking(out, False)
    assert os.get_blocking(err)
    ends.close()


def test_nothing_but_pipes_goes_to_a_runtime() -> None:
    with open(os.devnull, "r+b") as null:
        for streams in ((None, None, None), (null, null, nsjail_py.STDOUT), (nsjail_py.PIPE, nsjail_py.DEVNULL, null)):
            ends = Ends(*streams, only_pipes=True)
            assert all(stat.S_ISFIFO(os.fstat(descriptor).st_mode) for descriptor in ends.inside)
            ends.close()


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_no_other_user_of_the_host_reads_a_run_s_script_arguments_or_environment(runtime: str) -> None:
    policy = backend(runtime, env={"KEY": "secret"})
    with nsjail_py.Jail(policy).start_python(
        "print('secret', flush=True); input()", stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"secret\n"
        assert isinstance(process, oci_backend.OciProcess)
        find = ["find", str(process._run.top), "-xdev", "-type", "f", "-exec", "grep", "-l", "secret", "{}", "+"]
        assert len(subprocess.run(find, capture_output=True, check=False).stdout.splitlines()) > 1
        nobody = subprocess.run(find, user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
        assert nobody.stdout == b"" and b"main.py: Permission denied" in nobody.stderr, nobody
        process.kill()


@needs_root
def test_a_run_under_a_runtime_leaves_nothing(leaves_nothing: None) -> None:
    before = set(os.listdir("/run/nsjail_py"))
    nsjail_py.run_python("print(1)", policy=backend("runc")).check()
    assert set(os.listdir("/run/nsjail_py")) <= before


@needs_root
@pytest.mark.elsewhere(not oci_backend.HYBRID.is_mount(), why="its control groups are of one version")
@pytest.mark.skipif(not shutil.which("crun"), reason="crun is not installed: apt install crun")
def test_crun_has_its_control_groups_of_version_1_where_it_refuses_those_of_both() -> None:
    with nsjail_py.Jail(backend("crun")).start_python("import time; time.sleep(60)") as process:
        groups = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        (group,) = [line.split(":", 2)[2] for line in groups if ":memory:" in line]
        limit = Path(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes").read_text()
        assert int(limit) == policyfile.load("untrusted").limits.memory
        process.kill()
    assert oci_backend.HYBRID.is_mount() and not Path(f"/sys/fs/cgroup/memory{group}").exists()


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_a_runtime_runs_whatever_the_umask_was(runtime: str, place: Path, narrow_umask: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "text").write_text("text")
    (place / "text").chmod(0o644)
    mounts = (Mount(source=str(place / "text"), target="/data/text"),)
    oci_bundle.bundle(replace(policyfile.load("moderate"), mounts=mounts), place / "new" / "b", ["/bin/cat", "/data/text"])
    done = under(runtime, place / "new" / "b", place / "state")
    assert done.stdout == b"text", done
    monkeypatch.setattr(launcher, "LOCKS", place / "locks")
    assert nsjail_py.run(["/bin/cat", "/data/text"], policy=backend(runtime, mounts=mounts)).check().stdout == b"text"


@needs_root
def test_what_a_runtime_cannot_give_is_an_error_that_names_the_lines() -> None:
    with pytest.raises(nsjail_py.Unavailable, match=r"Landlock.*landlock = false.*exec = true"):
        nsjail_py.Jail(backend="oci:runc")
    with pytest.raises(nsjail_py.Unavailable, match="preload"):
        nsjail_py.Jail(backend("runc"), preload=[])
    with nsjail_py.Jail(backend("runc")) as jail, pytest.raises(nsjail_py.PolicyError, match=r"\$\.backend"):
        jail.session()


@needs_root
@pytest.mark.parametrize("label", [{"apparmor": "nsjail-payload"}, {"selinux": "a:b:c:s0"}], ids=str)
def test_a_label_is_refused_under_a_runtime_or_said_to_be_missing(label: dict[str, str]) -> None:
    (module,) = label
    with pytest.raises(nsjail_py.Unavailable, match=r"label of a security module.*no apparmor or selinux"):
        nsjail_py.Jail(backend("runc", **label))
    states = oci_backend.told(backend("runc", **label), [Protection(module, "applied", "")])
    assert states == (Protection(module, "unavailable", oci_bundle.BEYOND["label"]),)
    if WORKING:
        result = nsjail_py.run(["/bin/true"], policy=backend(WORKING[0], best_effort=(module, *backend("runc").best_effort), **label))
        assert result.ok and Protection(module, "unavailable", oci_bundle.BEYOND["label"]) in result.protections


@needs_root
def test_a_bundle_says_all_that_the_policy_asks_for_and_no_runtime_gives(tmp_path: Path) -> None:
    moderate = policyfile.load("moderate")
    plain = replace(moderate, landlock=False, syscalls=None, best_effort=(*moderate.best_effort, "apparmor", "selinux"))
    always = oci_bundle.bundle(plain, tmp_path / "plain", ["/bin/true"]).unavailable
    wanted = {
        "time_namespace": {"namespaces": (*plain.namespaces, "time")},
        "label": {"apparmor": "nsjail-payload"},
        "landlock": {"landlock": True},
        "denied": {"syscalls": Syscalls(allow=("@files",))},
        "denied on_denied": {"syscalls": Syscalls(allow=("@files",), on_denied="kill")},
        "denied no_exec": {"syscalls": Syscalls(allow=("@files",), exec=False)},
    }
    for names, changes in wanted.items():
        told = oci_bundle.bundle(replace(plain, **changes), tmp_path / names, ["/bin/true"]).unavailable
        assert set(told) - set(always) == set(names.split()), names
        written = json.loads((tmp_path / names / "config.json").read_text())
        assert written["annotations"]["nsjail_py.unavailable"].split("; ") == list(told)
    assert "nested_userns" in always


def test_a_missing_runtime_is_an_error_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(oci_backend, "CLEAN_PATH", str(tmp_path))
    with pytest.raises(nsjail_py.Unavailable, match="apt install runsc"):
        nsjail_py.Jail(backend("runsc"))


@pytest.mark.parametrize("name", ["docker", "oci:", "oci:../runc", "OCI:runc"])
def test_a_backend_that_is_none_is_a_fault_of_the_policy(name: str) -> None:
    with pytest.raises(nsjail_py.PolicyError, match="backend"):
        nsjail_py.Jail(backend=name)


def test_a_bundle_does_not_write_over_another(tmp_path: Path) -> None:
    (tmp_path / "b" / "rootfs").mkdir(parents=True)
    with pytest.raises(nsjail_py.JailError):
        oci_bundle.bundle("moderate", tmp_path / "b", ["/bin/true"])


def test_rules_written_for_a_runtime_are_those_of_the_policy() -> None:
    written = oci_seccomp.write(Syscalls(allow=("@files", "@threads"), exec=False), executes=False)
    allowed = {name for rule in written["syscalls"] for name in rule["names"] if rule["action"] == "SCMP_ACT_ALLOW"}
    assert allowed == set(syscalls.calls_of(Syscalls(allow=("@files", "@threads"), exec=False)))
    again = oci_seccomp.read(json.dumps(written).encode())
    assert set(syscalls.calls_of(again.syscalls)) <= allowed
