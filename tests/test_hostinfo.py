"""What the host offers: the probe's answers agree with the kernel's own, it changes nothing, and each lack has a remedy."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from conftest import PATIENCE

from nsjail_py import advice, hostinfo, userns
from nsjail_py._native import lib

STEPS = [name.removeprefix("STEP_").lower().replace("_", " ") for name in dir(lib) if name.startswith("STEP_")]
WHOLE = msgspec.structs.replace(
    hostinfo.probe(),
    kernel=(6, 12, 0),
    euid=1000,
    filtered=False,
    landlock_abi=6,
    seccomp_actions=("kill_process", "errno", "user_notif", "allow"),
    calls=tuple((name, errno.EBADF) for name in hostinfo.CALLS),
)
"""A host that lacks nothing."""


def status(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def children() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


def test_the_probe_says_what_the_kernel_says() -> None:
    host = hostinfo.probe()
    assert platform.release().startswith(f"{host.kernel[0]}.{host.kernel[1]}")
    assert host.euid == os.geteuid()
    assert host.capabilities == int(status("CapEff"), 16)
    assert host.filtered == (status("Seccomp") == "2")
    assert set(host.seccomp_actions) >= {"errno", "allow"}
    assert host.memory > 2**20
    [swap] = [line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SwapTotal:")]
    assert host.swap == int(swap) * 1024
    assert 0 <= host.landlock_abi < 100


def test_the_probe_is_cheap() -> None:
    times = []
    for _ in range(20):
        hostinfo.probe.cache_clear()
        start = time.perf_counter()
        hostinfo.probe()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01 * PATIENCE


def test_the_probe_leaves_no_descriptor_and_no_child() -> None:
    before = os.listdir("/proc/self/fd"), children()
    hostinfo.probe.cache_clear()
    hostinfo.probe()
    userns.refusal(hostinfo.probe())
    lib.probe_proc(1)
    assert (os.listdir("/proc/self/fd"), children()) == before


def test_the_namespaces_of_this_process_stay_as_they_are() -> None:
    kinds = ("user", "mnt", "pid", "net")
    before = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    lib.probe_userns(userns.NAMESPACES["mount"] | userns.NAMESPACES["net"])
    assert [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds] == before


def test_a_refused_namespace_is_reported_with_its_errno() -> None:
    """In a child whose filter-free limit of namespaces is none: a user namespace in which max_user_namespaces is 0."""
    code = (
        "import errno, os; from nsjail_py._native import lib\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "print(lib.probe_userns(0) == errno.ENOSPC)\n"
        "from nsjail_py import hostinfo, userns\n"
        "print(userns.refusal(hostinfo.probe()))\n"
    )
    done = subprocess.run(["unshare", "--user", "--map-root-user", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("True\n"), done.stdout + done.stderr
    assert "user.max_user_namespaces is 0" in done.stdout


def test_a_probe_that_is_not_there_is_an_error_and_no_call() -> None:
    assert lib.probe_call(-1) == lib.probe_call(lib.PROBE_CALLS) == errno.EINVAL


def test_a_whole_host_lacks_nothing() -> None:
    assert WHOLE.lacks() == []
    assert WHOLE.modes == ("delegated", "rootless")


@pytest.mark.parametrize(
    ("changes", "name", "remedy"),
    [
        ({"landlock_abi": 0}, "landlock", "lsm="),
        ({"seccomp_actions": ("kill_process", "errno", "allow")}, "seccomp", "CONFIG_SECCOMP_FILTER"),
        ({"calls": (("mount_setattr", errno.ENOSYS),)}, "mount_setattr", "Linux 5.12"),
        ({"calls": (("clone3", errno.ENOSYS),), "filtered": True}, "clone3", "seccomp=unconfined"),
        ({"calls": (("clone3", errno.ENOSYS),), "filtered": True}, "clone3", "RestrictNamespaces=no"),
        ({"euid": 0, "capabilities": 1 << 21}, "capabilities", "CAP_SETUID"),
    ],
)
def test_each_lack_has_its_remedy(changes: dict[str, object], name: str, remedy: str) -> None:
    (lack,) = msgspec.structs.replace(WHOLE, **changes).lacks()
    assert lack.name == name
    assert remedy in lack.remedy
    assert lack.reason


def test_the_right_to_mount_is_not_asked_of_an_ordinary_user() -> None:
    calls = tuple((name, errno.EPERM if name == "fsopen" else errno.EBADF) for name in hostinfo.CALLS)
    assert msgspec.structs.replace(WHOLE, calls=calls).lacks() == []


@pytest.mark.parametrize(
    ("sysctl", "value", "error", "remedy"),
    [
        ("user/max_user_namespaces", "0", errno.ENOSPC, "sysctl -w user.max_user_namespaces=15000"),
        ("kernel/unprivileged_userns_clone", "0", errno.EPERM, "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", errno.EACCES, "nsjail-py apparmor launcher | sudo tee"),
    ],
)
def test_who_forbids_user_namespaces_is_named(
    sysctl: str, value: str, error: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / sysctl).parent.mkdir()
    (tmp_path / sysctl).write_text(f"{value}\n")
    monkeypatch.setattr(userns, "SYSCTL", tmp_path)
    assert userns._blame("user namespace", error, WHOLE).remedy.startswith(remedy)


def test_a_refusal_that_nobody_knows_still_has_something_to_read() -> None:
    lack = userns._blame("user namespace", errno.EIO, WHOLE)
    assert "Input/output error" in lack.reason
    assert "dmesg" in lack.remedy


# ---------------------------------------------------------------- advice


def test_advice_is_given_only_for_steps_that_the_launcher_knows() -> None:
    assert {step for step, _ in advice.ROWS} <= {*STEPS, "launcher"}, "the launcher's own start is a step of the caller"


def test_advice_names_no_errno_that_is_unknown() -> None:
    assert {error for _, error in advice.ROWS} - {advice.ANY} <= set(errno.errorcode)


@pytest.mark.parametrize(
    ("step", "error", "part"),
    [
        ("user namespace", errno.EPERM, "kernel.apparmor_restrict_unprivileged_userns"),
        ("mount private", errno.ENOSYS, "Linux 5.12"),
        ("mount proc", errno.EPERM, "/proc"),
        ("lost", errno.ECHILD, "killed"),
    ],
)
def test_a_failed_step_comes_with_what_to_do(step: str, error: int, part: str) -> None:
    assert part in advice.advice(step, error)


def test_a_step_without_a_remedy_has_none_invented() -> None:
    assert advice.advice("exec", errno.EIO) == advice.advice("no such step", errno.EPERM) == ""
