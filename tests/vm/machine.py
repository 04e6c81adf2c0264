"""Boots a test machine, runs one command in it with a copy of this checkout, and passes on its output and exit status.

    us --disk: checkout and job--> machine --port `out`--> our standard output
                                           --port `status`--> a file: `up SECONDS` when the job begins, `status N` when it ends

Nothing that the machine writes is kept, and it does not outlive us. KVM is used where a kernel was seen to boot under it (there are hosts
whose /dev/kvm opens and cannot run one); elsewhere qemu emulates.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import images
from images import TroubleError

User = Literal["root", "delegated", "plain"]
USERS: tuple[User, ...] = get_args(User)
QEMU = "qemu-system-x86_64"
BOOT_SECONDS = int(os.environ.get("DEV_VM_BOOT_SECONDS", "300"))
"""A boot takes 10 to 30 seconds under emulation, and several times as long on a loaded machine."""
NEEDED = 1 << 30
"""Bytes that must be free before a boot: more than what the suite writes to the machine's disks."""
PROBE_SECONDS = 20
TCG = ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "Nehalem"]  # x86-64-v2, which numpy wants, and quicker to boot than `max`
KVM = ["-accel", "kvm", "-cpu", "host"]
APPEND = "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off no_timer_check random.trust_cpu=on systemd.show_status=0"
SECURITY = {"apparmor": "audit=0", "selinux": "security=selinux selinux=1"}  # what SELinux refuses stands in the kernel's log


@dataclass(frozen=True)
class Machine:
    """Which one."""

    distro: str
    kernel: str

    @property
    def release(self) -> str:
        return (images.kernel(self.kernel) / "release").read_text().strip()


@dataclass(frozen=True)
class Outcome:
    """How a command in a machine ended."""

    status: int
    boot: float
    """Seconds from the start of qemu to the start of the command."""


def run(machine: Machine, user: User, command: list[str], out: BinaryIO, seconds: float) -> Outcome:
    """Raises TroubleError when there is no exit status to pass on."""
    if shutil.which(QEMU) is None:
        raise TroubleError(f"no {QEMU}: install the package qemu-system-x86")
    disk, kernel = images.root(machine.distro), images.kernel(machine.kernel)
    accelerator = _accelerator(kernel)
    images.require_space(NEEDED, "a machine")
    with tempfile.TemporaryDirectory(prefix="run-", dir=images.CACHE) as name:
        work = Path(name)
        _remove_abandoned()
        patience = "1" if accelerator is KVM else "10"
        share = _share(work, ["/bin/sh", "/media/run-as", user, "env", f"TEST_PATIENCE={patience}", *command])
        drives = [(disk, "snapshot=on,cache=unsafe"), (kernel / "modules.img", "readonly=on"), (share, "cache=unsafe")]
        append = f"{APPEND} {SECURITY[images.security(machine.distro)]}"
        return _boot(work, _command(kernel, work / "console", append), [*accelerator, *_drives(drives)], out, seconds)


def _remove_abandoned() -> None:
    """Working directories of ours that were killed. They are told by age: a machine in use writes its console."""
    for path in images.CACHE.glob("run-*"):
        with contextlib.suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (path, *path.iterdir())) > 86400:
                shutil.rmtree(path)


def _share(work: Path, command: list[str]) -> Path:
    """A disk with the checkout, what runs the command, and the command."""
    disk, tree = work / "share.img", work / "share"
    tree.mkdir()
    images.copy_checkout(tree / "src")
    shutil.copy(images.HERE / "guest" / "run-as", tree)
    (tree / "job").write_text(f"exec {shlex.join(command)}\n")
    with open(disk, "wb") as file:
        file.truncate(1 << 30)
    _must(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", str(tree), str(disk)])
    shutil.rmtree(tree)
    return disk


def _must(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise TroubleError(f"no {command[0]} here") from None
    if done.returncode:
        raise TroubleError(f"{command[0]} failed ({done.returncode}): {' '.join(done.stderr.split())}")


def _drives(drives: list[tuple[Path, str]]) -> list[str]:
    """An error is the machine's to see: qemu would stop it when our disk is full, and we would wait for it."""
    arguments = []
    for number, (path, options) in enumerate(drives):
        arguments += [
            "-drive",
            f"file={path},format=raw,if=none,id=disk{number},werror=report,rerror=report,{options}",
            "-device",
            f"virtio-blk-pci,drive=disk{number}",
        ]
    return arguments


def _command(kernel: Path, console: Path, append: str) -> list[str]:
    die_with_us = ["setpriv", "--pdeathsig", "KILL"]
    machine = ["-M", "q35", "-smp", "2", "-m", "3G", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    boot = ["-serial", f"file:{console}", "-kernel", str(kernel / "vmlinuz"), "-initrd", str(kernel / "initrd"), "-append", append]
    return [*die_with_us, QEMU, *machine, *boot, "-device", "virtio-rng-pci"]


def _accelerator(kernel: Path) -> list[str]:
    """KVM or emulation. The answer is kept for this kernel and this host's boot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answer = kernel / f"kvm-{boot}"
    if not answer.exists():
        for stale in kernel.glob("kvm-*"):
            stale.unlink()
        answer.write_text("yes" if _boots_under_kvm(kernel) else "no")
    return KVM if answer.read_text() == "yes" else TCG


def _boots_under_kvm(kernel: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="run-", dir=images.CACHE) as work:
        console = Path(work, "console")
        command = [*_command(kernel, console, "console=ttyS0 vm.probe panic=-1"), *KVM]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False)
        return console.exists() and b"vm: alive" in console.read_bytes()


def _boot(work: Path, command: list[str], arguments: list[str], out: BinaryIO, seconds: float) -> Outcome:
    console, status, log = work / "console", work / "status", work / "qemu"
    status.touch()
    read_end, write_end = os.pipe()
    ports = ["-device", "virtio-serial-pci,id=ports"]
    for number, (name, path) in enumerate({"out": f"/proc/self/fd/{write_end}", "status": str(status)}.items(), 1):
        ports += ["-chardev", f"file,id={name},path={path},append=on"]
        ports += ["-device", f"virtserialport,bus=ports.0,nr={number},chardev={name},name={name}"]
    began = time.monotonic()
    with open(log, "wb") as errors:
        qemu = subprocess.Popen(
            [*command, *arguments, *ports],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[write_end],
            env={**os.environ, "TMPDIR": str(work)},  # where what the machine writes to its root goes
        )
    os.close(write_end)
    try:
        boot = _pass_on(read_end, out, status, began, seconds)
        qemu.wait(timeout=60)
    except (TroubleError, subprocess.TimeoutExpired) as error:
        raise TroubleError(f"{error}; {_last_words(console, log)}") from None
    finally:
        os.close(read_end)
        qemu.kill()
        qemu.wait()
    if ended := re.search(r"^status (\d+)$", status.read_text(), re.M):
        return Outcome(int(ended[1]), boot)
    raise TroubleError(f"the machine ended without an exit status (qemu: {qemu.returncode}); {_last_words(console, log)}")


def _pass_on(source: int, out: BinaryIO, status: Path, began: float, seconds: float) -> float:
    """The machine's output, until it has switched itself off. Returns how long it took to boot."""
    boot = 0.0
    while True:
        ready, _, _ = select.select([source], [], [], 0.2)
        past = time.monotonic() - began
        if not boot and status.stat().st_size:
            boot = past
        if ready:
            data = os.read(source, 1 << 16)
            if not data:
                return boot
            out.write(data)
            out.flush()
        if not boot and past > BOOT_SECONDS:
            raise TroubleError(f"the machine did not boot within {BOOT_SECONDS} s")
        if boot and past - boot > seconds:
            raise TroubleError(f"the command did not end within {seconds:.0f} s")


def _last_words(console: Path, log: Path) -> str:
    lines = [line.strip() for path in (log, console) if path.exists() for line in path.read_text(errors="replace").splitlines()]
    return "its last words: " + (" | ".join([line for line in lines if line][-3:]) or "none")
