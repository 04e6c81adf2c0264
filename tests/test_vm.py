"""./dev vm: without a machine there is one line and 125, nothing half built looks good, and what pytest said is written down as it was.

No machine is booted here; `./dev vm-smoke` does that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "vm"))

import box
import cli
import hosts
import images
import machine
from images import TroubleError

CLI = ROOT / "tests" / "vm" / "cli.py"
WHICH = machine.Machine("debian12", "6.1")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, in which building takes no time."""
    place = tmp_path / "cache"
    monkeypatch.setattr(images, "CACHE", place)
    monkeypatch.setattr(images, "NEEDED", 0)
    monkeypatch.setattr(machine, "NEEDED", 0)
    builder = script(tmp_path / "build.sh", "touch $1/root.img $1/vmlinuz $1/initrd $1/modules.img; echo 6.1-fake >$1/release")
    monkeypatch.setattr(images, "_build_root", lambda name, part: ["sh", str(builder), str(part)])
    monkeypatch.setattr(images, "_build_kernel", lambda name, part: ["sh", str(builder), str(part)])
    monkeypatch.setattr(machine, "_accelerator", lambda kernel: machine.TCG)
    return place


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in front of the real one, if there is one. So does what makes disks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "mke2fs", "exit 0")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / machine.QEMU


def boot(seconds: float = 60, which: machine.Machine = WHICH) -> machine.Outcome:
    with open(os.devnull, "wb") as nowhere:
        return machine.run(which, "root", ["true"], nowhere, seconds)


def test_without_qemu_there_is_one_line_and_125(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, CLI, "vm", "--", "true"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr == "vm: no qemu-system-x86_64: install the package qemu-system-x86\n"


def test_without_space_nothing_is_begun(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "NEEDED", 1 << 60)
    with pytest.raises(TroubleError, match="MiB free"):
        images.root("debian12")
    assert not list(cache.glob("root-*"))


def test_a_build_that_fails_leaves_no_image_and_says_its_last_words(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script(tmp_path / "broken.sh", "touch $1/root.img; echo no such suite >&2; exit 3")
    monkeypatch.setattr(images, "_build_root", lambda name, part: ["sh", str(broken), str(part)])
    with pytest.raises(TroubleError, match=r"broken.sh failed \(3\): no such suite"):
        images.root("debian12")
    assert not list(cache.glob("root-*"))


def test_a_build_that_ran_out_of_space_says_so_when_its_files_are_gone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = script(tmp_path / "greedy.sh", "touch $1/full; sleep 1; rm $1/full; exit 1")
    monkeypatch.setattr(images, "_build_root", lambda name, part: ["sh", str(greedy), str(part)])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if list(path.glob("*.part/full")) else 1 << 40))
    with pytest.raises(TroubleError, match=r"^greedy.sh failed \(1\): the disk was full$"):
        images.root("debian12")


def test_a_build_that_outlives_its_tool_is_waited_for(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slow = script(tmp_path / "slow.sh", f"echo >{tmp_path}/begun; sleep 2; touch $1/half {tmp_path}/ended")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import images; images.CACHE, images.NEEDED = images.Path(sys.argv[2]), 0; images._image('root', 'debian12', [], lambda name, part: ['sh', sys.argv[3], str(part)])"
    with subprocess.Popen([sys.executable, "-c", code, ROOT / "tests/vm", cache, slow]) as tool:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        tool.kill()
    assert images.root("debian12").exists()
    assert (tmp_path / "ended").exists() and "waiting for another build" in capfd.readouterr().err
    assert not list(cache.glob("*.part"))


def test_what_root_left_of_a_killed_build_is_removed_by_root(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "root-debian12-0.part").mkdir(parents=True)
    sudo = script(tmp_path / "sudo", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    remove = shutil.rmtree

    def refused(path: Path, **options: bool) -> None:
        if path.name == "root-debian12-0.part":
            raise PermissionError
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(TroubleError, match=r"sudo rm -rf --one-file-system .*/root-debian12-0.part"):
        images.root("debian12")
    script(sudo, 'shift; exec "$@"')
    assert images.root("debian12").exists() and not list(cache.glob("*.part"))


def test_what_a_killed_build_left_is_not_taken_for_an_image(cache: Path) -> None:
    good = images.root("debian12").parent
    good.rename(f"{good}.part")
    (cache / f"{good.name}.part" / "half").touch()
    assert images.root("debian12").parent == good
    assert not (good / "half").exists() and not list(cache.glob("*.part"))


def test_an_image_is_built_once_and_anew_when_what_it_is_made_from_changes(cache: Path) -> None:
    def build(made_from: str) -> Path:
        return images._image("root", "debian12", [made_from], images._build_root)

    first = build("one")
    (first / "mark").touch()
    assert build("one") == first and (first / "mark").exists()
    assert build("two") != first and not first.exists(), "the old one goes"


def test_an_image_takes_no_other_machine_s_away(cache: Path) -> None:
    others = [images.root(distro) for distro in images.DISTROS if distro != "debian13"]
    assert images.root("debian13").exists() and all(other.exists() for other in others)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "checkout"
    (place / "folder").mkdir(parents=True)
    (place / "folder" / "file").touch()
    monkeypatch.setattr(images, "TOP", place)
    return place


def test_a_file_of_the_checkout_that_cannot_be_copied_is_named_with_the_reason(checkout: Path, tmp_path: Path) -> None:
    os.mkfifo(checkout / "folder" / "pipe")
    with pytest.raises(TroubleError, match=r"cannot copy .*/checkout/folder/pipe: .*named pipe"):
        images.copy_checkout(tmp_path / "copy")


def test_what_vanishes_from_the_checkout_while_it_is_copied_is_left_out(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "gone").mkdir()

    def ignore(folder: str, names: list[str]) -> set[str]:  # asked when a folder was listed, and before its files are copied
        if folder == str(checkout):
            (checkout / "gone").rmdir()
        else:
            (checkout / "folder" / "other").unlink()
        return set()

    (checkout / "folder" / "other").touch()
    monkeypatch.setattr(images, "NOT_SOURCE", ignore)
    images.copy_checkout(tmp_path / "copy")
    assert [str(path.relative_to(tmp_path / "copy")) for path in sorted((tmp_path / "copy").rglob("*"))] == ["folder", "folder/file"]


PIECES = {
    "apt-get": "",
    "apt-cache": "echo Depends: linux-image-6.1-fake",
    "dpkg-deb": "mkdir -p $3/bin $3/boot $3/lib/modules/6.1-fake/kernel; touch $3/bin/busybox $3/boot/vmlinuz",
    "depmod": "",
    "mke2fs": "",
    "modprobe": "case $6 in ext4) echo builtin ext4 ;; *) touch $2/$6.ko; echo insmod $2/$6.ko ;; esac",
    "cpio": "sed 's,^[.]/,,'",  # an archive that is the list of its files
    "gzip": "cat",
}


@pytest.mark.parametrize(
    ("piece", "text", "said"),
    [
        ("true", "", ""),
        ("modprobe", "case $6 in virtio_blk) echo no virtio_blk >&2; exit 1 ;; esac", "no virtio_blk"),
        ("modprobe", "", "the initrd has no virtio_pci"),
        ("cpio", "case $1 in -o) echo no space >&2; exit 1 ;; esac", "no space"),
        ("cpio", "grep -vx ./init", "the initrd has no init"),
        ("gzip", "case $1 in -1) echo no space >&2; exit 1 ;; esac; cat", "no space"),
    ],
    ids=["whole", "module refused", "no modules", "archive refused", "no init", "disk full"],
)
def test_a_kernel_whose_initrd_is_not_whole_is_not_kept(tmp_path: Path, piece: str, text: str, said: str) -> None:
    folder, out = tmp_path / "bin", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    for name, body in {**PIECES, piece: text}.items():
        script(folder / name, body)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["sh", ROOT / "tests/vm/build-kernel.sh", "bookworm", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0, done.stderr.strip()) == (said != "", said)
    assert {file.name for file in out.iterdir()} >= ({"vmlinuz", "initrd", "modules.img", "release"} if not said else set())


def test_an_image_of_another_suite_is_another_image(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = images.root("debian-testing").parent, images.kernel("testing")
    monkeypatch.setitem(images.DISTROS, "debian-testing", "duke")
    monkeypatch.setitem(images.KERNELS, "testing", "duke")
    assert images.root("debian-testing").parent != before[0] and images.kernel("testing") != before[1]


def test_all_of_an_image_is_on_the_disk_before_it_has_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    whole = images.kernel("6.1")
    assert synced == {f"{whole}.part", *(f"{whole}.part/{file.name}" for file in whole.iterdir())}


def test_a_boot_that_hangs_is_given_up(cache: Path, qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(qemu, "exec sleep 1000")
    monkeypatch.setattr(machine, "BOOT_SECONDS", 1)
    with pytest.raises(TroubleError, match="did not boot within 1 s"):
        boot()
    assert not list(cache.glob("run-*"))


def test_a_machine_that_dies_says_its_last_words(cache: Path, qemu: Path) -> None:
    script(qemu, "echo no such device >&2; exit 1")
    with pytest.raises(TroubleError, match=r"without an exit status .*no such device"):
        boot()


def port(name: str, text: str) -> str:
    """A stand-in for qemu that writes `text` where the machine would have this port."""
    return f"for word; do case $word in file,id={name},path=*) path=${{word#*path=}}; printf '{text}' >>\"${{path%%,*}}\" ;; esac; done"


def status_port(text: str) -> str:
    return port("status", text)


def test_the_status_of_the_command_is_passed_on(cache: Path, qemu: Path) -> None:
    script(qemu, status_port("up 3.2\\nstatus 7\\n"))
    assert boot().status == 7
    assert not list(cache.glob("run-*"))


def test_a_machine_is_built_and_booted_with_its_security_module(cache: Path, qemu: Path, tmp_path: Path) -> None:
    for distro in images.DISTROS:
        selinux = distro == "debian13-selinux"
        script(qemu, status_port("status 0\\n") + f"; echo $* >{tmp_path}/words")
        assert boot(which=machine.Machine(distro, "6.12")).status == 0
        assert ("security=selinux" in (tmp_path / "words").read_text()) == selinux
        assert images.security(distro) == ("selinux" if selinux else "apparmor")


def test_a_command_that_does_not_end_is_given_up(cache: Path, qemu: Path) -> None:
    script(qemu, status_port("up 3.2\\n") + "; exec sleep 1000")
    with pytest.raises(TroubleError, match="did not end within 1 s"):
        boot(seconds=1)


def test_the_time_for_the_command_begins_when_it_does(cache: Path, qemu: Path) -> None:
    script(qemu, "sleep 1.5; " + status_port("up 3.2\\nstatus 0\\n"))
    assert boot(seconds=1).status == 0


def test_without_space_no_machine_is_booted(cache: Path, qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(qemu, f"touch {tmp_path}/booted")
    monkeypatch.setattr(machine, "NEEDED", 1 << 60)
    with pytest.raises(TroubleError, match=r"MiB free, and a machine needs"):
        boot()
    assert not (tmp_path / "booted").exists()


def test_a_machine_sees_that_a_disk_fails_and_is_not_stopped(cache: Path, qemu: Path, tmp_path: Path) -> None:
    script(qemu, status_port("status 0\\n") + f"; echo $* >{tmp_path}/words")
    boot()
    drives = [word for word in (tmp_path / "words").read_text().split() if word.startswith("file=")]
    assert len(drives) == 3 and all("werror=report,rerror=report" in drive for drive in drives)


def console(text: str) -> str:
    """A stand-in for qemu that writes `text` where the machine would have its console."""
    return f"for word; do case $word in file:*) echo {text} >${{word#file:}} ;; esac; done"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel, on a host with a /dev/kvm that opens."""
    monkeypatch.setattr(images, "CACHE", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path == "/dev/kvm")
    (tmp_path / "kernel").mkdir()
    return tmp_path / "kernel"


@pytest.mark.parametrize(
    ("probe", "answer"),
    [
        (console("vm: alive"), machine.KVM),
        (f"{console('Linux version')}; exec sleep 1000", machine.TCG),
        ("echo no such accelerator >&2; exit 1", machine.TCG),
    ],
    ids=["runs", "hangs", "ends"],
)
def test_a_host_has_kvm_when_a_kernel_was_seen_to_run_under_it_and_is_asked_once(
    kernel: Path, qemu: Path, probe: str, answer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "PROBE_SECONDS", 1)
    (kernel / "kvm-of-another-boot").write_text("maybe")
    script(qemu, probe)
    assert machine._accelerator(kernel) is answer
    script(qemu, console("vm: alive" if answer is machine.TCG else "another answer"))
    assert machine._accelerator(kernel) is answer
    assert len(list(kernel.iterdir())) == 1, "what was said of another boot is gone"


def test_where_dev_kvm_does_not_open_nothing_is_asked(kernel: Path, qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine._accelerator(kernel) is machine.TCG and not list(kernel.iterdir())


def test_a_box_has_the_image_its_kernel_and_how_to_boot_it(cache: Path, qemu: Path, tmp_path: Path) -> None:
    script(qemu.with_name("qemu-img"), 'for last; do :; done; echo converted >"$last"')
    assert box.make(WHICH, tmp_path / "a.box") == 0
    with tarfile.open(tmp_path / "a.box") as made:
        files = {name: cast(BinaryIO, made.extractfile(name)).read().decode() for name in made.getnames()}
    assert set(files) == {"metadata.json", "Vagrantfile", "box.img", "vmlinuz", "initrd"}
    assert files["box.img"] == "converted\n" and json.loads(files["metadata.json"])["provider"] == "libvirt"
    assert "systemd.wants=ssh.service" in files["Vagrantfile"] and "audit=0" in files["Vagrantfile"]


def test_a_box_that_cannot_be_made_leaves_what_was_there(cache: Path, qemu: Path, tmp_path: Path) -> None:
    script(qemu.with_name("qemu-img"), "echo no space >&2; exit 1")
    (tmp_path / "a.box").write_text("the one before")
    with pytest.raises(TroubleError, match="qemu-img failed: no space"):
        box.make(WHICH, tmp_path / "a.box")
    assert [file.read_text() for file in tmp_path.glob("*.box*")] == ["the one before"] and not list(cache.glob("run-*"))


def test_a_killed_tool_takes_its_machine_along(cache: Path, qemu: Path, tmp_path: Path) -> None:
    script(qemu, f"echo $$ >{tmp_path}/pid; exec sleep 1000")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import machine, test_vm; work, kernel = map(test_vm.Path, sys.argv[2:4]); machine._boot(work, machine._command(kernel, work / 'console', ''), [], sys.stdout.buffer, 99)"
    (tmp_path / "work").mkdir()
    tool = subprocess.Popen([sys.executable, "-c", code, ROOT / "tests/vm", tmp_path / "work", tmp_path], cwd=ROOT / "tests")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    tool.send_signal(signal.SIGKILL)
    tool.wait()
    deadline = time.monotonic() + 10
    while (left := command_line(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def command_line(pid: int) -> bytes:
    """Empty when it is gone, or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_what_runs_without_a_command_is_said() -> None:
    for command in (["sh", ROOT / "dev", "help"], [sys.executable, CLI, "vm", "--help"]):
        said = subprocess.run(command, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=True).stdout
        assert "uname -a" in said


@pytest.mark.parametrize("words", [["chaos", "x"], ["chaos", "9", "1.5"], ["fuzz", "-1"]])
def test_a_number_that_is_none_is_said_in_one_line_before_anything_is_set_up(words: list[str]) -> None:
    done = subprocess.run(["sh", ROOT / "dev", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"dev: not a whole number: {words[-1]}\n")


# ---------------------------------------------------------------- docs/hosts.md

SAID = """..F.s
FAILED tests/test_run.py::test_a - assert 1 == 2
SKIPPED [2] tests/test_programs.py:80: no such package
SKIPPED [1] tests/test_x.py:8: no such package
ELSEWHERE [1] tests/test_x.py:9: about version 1
========== 1 failed, 480 passed, 3 skipped in 754.20s (0:12:34) ==========
"""


def test_what_pytest_said_is_understood() -> None:
    assert hosts.understand(SAID) == hosts.Told(
        480, 1, 3, 754.2, {"no such package": 3}, ["tests/test_run.py::test_a"], {"about version 1": 1}
    )
    assert hosts.understand("12 passed in 3.10s\n").failed == 0
    assert hosts.understand("Segmentation fault\n").failed == 1, "no news is bad news"


def test_of_a_suite_that_was_broken_off_there_is_what_it_had_said() -> None:
    said = (
        "tests/a.py::test_b[x y] PASSED [ 1%]\ntests/a.py::test_c FAILED [ 2%]\ntests/a.py::test_d SKIPPED (no) [ 3%]\ntests/a.py::test_e "
    )
    told = hosts.understand(said)
    assert (told.passed, told.failed, told.skipped) == (1, 2, 1)
    assert told.failures == ["tests/a.py::test_c", "broken off behind tests/a.py::test_d"]


def test_a_machine_that_is_given_up_has_its_row_all_the_same(cache: Path, qemu: Path, tmp_path: Path) -> None:
    said = port("out", f"doctor\\n{hosts.SUITE}\\ntests/a.py::test_b PASSED\\n")
    script(qemu, f"{said}; {status_port('up 3.2')}; exec sleep 1000")
    document = tmp_path / "hosts.md"
    document.write_text(f"{hosts.HEAD}\n{hosts.RULE}\n")
    with pytest.raises(TroubleError, match="did not end within 1 s"):
        hosts.suite(WHICH, "root", [], 1, document)
    assert "| 1 | 1: " in document.read_text()


def test_a_machine_that_hangs_is_no_reason_to_leave_out_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def suite(which: machine.Machine, user: str, words: list[str], seconds: float) -> int:
        tried.append((which.distro, user))
        if tried[-1] == ("debian12", "delegated"):
            raise TroubleError("it did not boot")
        return 137

    monkeypatch.setattr(hosts, "suite", suite)
    arguments = cli.parser().parse_args(["vm-test"])
    assert arguments.do(arguments) == 125
    assert tried == [(distro, user) for distro in images.DISTROS for user in machine.USERS]
    assert capsys.readouterr().err == "vm: debian12, kernel 6.1, delegated: it did not boot\n"


def test_a_row_takes_the_place_of_its_predecessor_and_of_no_other() -> None:
    told = hosts.understand(SAID)
    rows = [hosts.row(WHICH, "6.1.0-50", user, "2026-11-24", told, 12.0) for user in ("root", "plain")]
    document = f"# Hosts\n\n{hosts.HEAD}\n{hosts.RULE}\n\n## Doctor\n"
    for line in (*rows, rows[0]):
        document = hosts.with_row(document, line)
    assert document == f"# Hosts\n\n{hosts.HEAD}\n{hosts.RULE}\n{rows[1]}\n{rows[0]}\n\n## Doctor\n"
    assert (
        "| 480 | 1: tests/test_run.py::test_a | 3: no such package (3). Not for this host or user: about version 1 (1) | 12 s | 12.6 min |"
        in rows[0]
    )


def test_what_doctor_said_takes_the_place_of_what_it_said_before() -> None:
    document = "# Hosts\n\n## Doctor\n"
    for title, report in (("a", "one"), ("b", "two"), ("a", "three\n\n  four")):
        document = hosts.with_doctor(document, title, report)
    assert document == "# Hosts\n\n## Doctor\n\n### a\n\n    three\n\n      four\n\n### b\n\n    two\n"


def test_the_document_has_its_table() -> None:
    assert f"{hosts.HEAD}\n{hosts.RULE}\n" in (ROOT / "docs" / "hosts.md").read_text()
