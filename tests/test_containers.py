"""Inside of other jails: an unprivileged container made by crun with what Docker gives it, and one of our own. A jail works, or the blocker is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import IS_ROOT, ROOT
from ordinary import python_for_all

import nsjail_py
from nsjail_py import Mount, Result

CRUN = shutil.which("crun")
WITHHELD = (
    "mount", "umount2", "pivot_root", "setns", "unshare", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr",
    "sethostname", "setdomainname", "keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd", "reboot", "swapon", "swapoff",
)  # fmt: skip
"""What Docker's profile refuses a container without CAP_SYS_ADMIN; besides, clone3 does not exist, and clone makes no namespace."""
NAMESPACES = 0x7E020000
CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "NET_RAW",
        "SYS_CHROOT",
    )
]
"""What Docker leaves to root in a container."""
SHOWN = ("/usr", "/etc", "/opt", str(ROOT))
REPORT = (
    "import nsjail_py; from nsjail_py import cli\n"
    "cli.main(['doctor'])\n"
    "try: print('RUN', nsjail_py.run(['/bin/true']).summary)\n"
    "except nsjail_py.JailError as error: print('RUN', error)\n"
)


NESTED: dict[str, Any] = {"nested_userns": True} | ({} if IS_ROOT else {"memory": None})
WITHOUT_CGROUP = ("user", "mount", "pid", "net", "ipc", "uts")


def seccomp() -> dict[str, object]:
    masked = {"index": 0, "value": NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [masked]},
            {"names": sorted(_known() - {*WITHHELD, "clone", "clone3"}), "action": "SCMP_ACT_ALLOW"},
        ],
    }


def _known() -> set[str]:
    from nsjail_py.syscalls import name_of

    return {name for number in range(470) if not (name := name_of(number)).isdigit() and name.replace("_", "").isalnum()}


def bundle(place: Path, user: int, changes: Callable[[dict[str, object]], None]) -> Path:
    """An OCI bundle whose root is ours, read-only, with a private /tmp."""
    root = place / "rootfs"
    for name in ("proc", "dev", "sys", "tmp", "var", "run", *(shown.strip("/") for shown in SHOWN)):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    subprocess.run([CRUN, "spec"], cwd=place, check=True)
    config = json.loads((place / "config.json").read_text())
    path = f"{sysconfig.get_path('purelib')}:{ROOT}"
    config["process"] |= {
        "terminal": False,
        "user": {"uid": user, "gid": user},
        "args": [python_for_all(), "-c", REPORT],
        "cwd": "/",
        "env": ["PATH=/usr/bin:/bin", "HOME=/tmp", "NSJAIL_PY_CACHE=/tmp/cache", f"PYTHONPATH={path}"],
        "capabilities": {kind: CAPABILITIES if user == 0 else [] for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
    }
    config["root"] = {"path": "rootfs", "readonly": True}
    config["mounts"] += [{"destination": name, "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]} for name in ("/tmp", "/run")]
    config["mounts"] += [{"destination": shown, "type": "bind", "source": shown, "options": ["rbind", "ro"]} for shown in SHOWN]
    config["linux"]["seccomp"] = seccomp()
    config["linux"]["resources"] = {}
    config["linux"]["cgroupsPath"] = f"/nsjail-test-{os.getpid()}"
    changes(config)
    (place / "config.json").write_text(json.dumps(config))
    return place


def in_container(place: Path, user: int = 0, changes: Callable[[dict[str, object]], None] = lambda config: None) -> str:
    bundle(place, user, changes)
    # crun takes no hybrid of both versions of control groups: in a mount namespace of its own there is none.
    script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    name = f"nsjail-test-{os.getpid()}"
    command = ["unshare", "--mount", "sh", "-c", script, "sh", CRUN, "--cgroup-manager=disabled", "run", "--bundle", place, name]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=300)
    assert "What this host offers" in done.stdout, done.stdout + done.stderr
    return " ".join(done.stdout.split())


made_by_crun = pytest.mark.skipif(not (IS_ROOT and CRUN), reason="no crun here, or we are not root")


@made_by_crun
@pytest.mark.parametrize("user", [0, 1000])
def test_in_a_container_like_dockers_the_filter_is_named_as_the_blocker(user: int, tmp_path: Path) -> None:
    said = in_container(tmp_path, user)
    assert "clone3 is refused by a system call filter remedy: a container profile" in said
    assert "LACK user namespace" in said
    assert "seccomp=unconfined" in said
    assert "RUN clone: Function not implemented; clone3 is missing" in said


@made_by_crun
def test_without_its_filter_the_masked_proc_is_named(tmp_path: Path) -> None:
    def changes(config: dict[str, object]) -> None:
        del config["linux"]["seccomp"]  # type: ignore[attr-defined]

    said = in_container(tmp_path, 1000, changes)
    assert "a fresh /proc cannot be mounted: Operation not permitted; covered here: /proc/" in said
    assert "systempaths=unconfined" in said
    assert "RUN mount proc: Operation not permitted" in said


@made_by_crun
def test_with_an_uncovered_proc_and_no_filter_an_ordinary_user_has_jails(tmp_path: Path) -> None:
    def changes(config: dict[str, object]) -> None:
        for name in ("seccomp", "maskedPaths", "readonlyPaths"):
            del config["linux"][name]  # type: ignore[attr-defined]

    assert "RUN ok: the program exited with 0" in in_container(tmp_path, 1000, changes)


def in_own_jail(program: str, **changes: Any) -> Result:
    """The program's Python has nsjail_py."""
    site = Path(msgspec.__file__).parents[1]
    env = {"PYTHONPATH": "/srv:/mnt", "NSJAIL_PY_CACHE": "/work/cache"}
    shown = [Mount(source=str(ROOT), target="/mnt"), Mount(source=str(site), target="/srv")]
    return nsjail_py.run([python_for_all(), "-c", program], policy="trusted", mounts=shown, env=env, **changes)


def test_in_a_jail_of_our_own_the_limit_of_namespaces_is_named() -> None:
    result = in_own_jail(REPORT)
    said = " ".join(result.stdout.decode().split())
    assert "LACK user namespace No space left on device: user.max_user_namespaces is 0, as inside of a jail" in said, result.stderr
    assert "RUN clone: No space left on device" in said
    assert said.count("nested_userns = true in its policy") == 3  # of the host, of the trial, of ours


def test_in_one_that_allows_it_a_covered_proc_is_named() -> None:
    said = " ".join(in_own_jail(REPORT, **NESTED).stdout.decode().split())
    assert "RUN mount proc: Operation not permitted (/proc); parts of the host's /proc are covered" in said
    assert 'a jail with proc = "masked"' in said


def test_in_one_that_leaves_proc_whole_the_default_policy_is_applied() -> None:
    """But for the namespace of control groups, where the jail around is an ordinary user's."""
    said = in_own_jail(REPORT, **NESTED, proc="pid").stdout.decode()
    if not IS_ROOT:
        assert "LACK  namespaces" in said
        assert "leave cgroup out of the policy's namespaces" in said
        said = in_own_jail(
            REPORT.replace("'/bin/true']", f"'/bin/true'], namespaces={WITHOUT_CGROUP}"), **NESTED, proc="pid"
        ).stdout.decode()
    assert "RUN ok: the program exited with 0" in said, said
