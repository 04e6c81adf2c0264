"""What a policy shows of the host: with the flags that it says, all the way down, at no place but its own, and never for writing by the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

import nsjail_py
from nsjail_py import JailError, Mount, PolicyError

from .runner import EVERY_WALL, WALLS, Attack, held, inside, outside

WALLED = ("untrusted", "moderate", "no-filter", "bare")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory in a file system that is mounted below /dev, which everybody may write: what lies below a shown directory."""
    top = Path(tempfile.mkdtemp(prefix="canary-", dir="/dev/shm"))
    top.chmod(0o777)
    (top / "file").write_text("some bytes")
    (top / "file").chmod(0o666)
    shutil.copy("/bin/true", top / "program")
    (top / "program").chmod(0o755)
    yield top
    shutil.rmtree(top)


BELOW = "top = T['top'] + '/shm/' + T['name']\n"
WRITE_BELOW = (
    BELOW
    + "for way in (lambda: open(top + '/new', 'w').close(), lambda: open(top + '/file', 'r+').close(), lambda: os.mkdir(top + '/d'), lambda: os.utime(top + '/file')):\n  try: way(); won()\n  except OSError: pass"
)


@pytest.mark.parametrize("wall", WALLED)
def test_a_file_system_below_a_read_only_directory_is_read_only(wall: str, shared: Path) -> None:
    """A bind with everything below it, whose flags are set on everything below it."""
    attack = Attack("", WRITE_BELOW)
    outside(attack, {"top": "/dev", "name": shared.name})
    for name in ("new", "d"):
        if (shared / name).exists():
            shutil.rmtree(shared / name) if name == "d" else (shared / name).unlink()
    seen = Attack("", BELOW + "print(os.listdir(top), flush=True)")
    mounts = [Mount(source="/dev", target="/data")]
    assert b"'file'" in inside(seen, wall, {"top": "/data", "name": shared.name}, mounts=mounts).stdout, "it must be there to be refused"
    held(inside(attack, wall, {"top": "/data", "name": shared.name}, mounts=mounts))
    assert sorted(os.listdir(shared)) == ["file", "program"]


@pytest.mark.parametrize("wall", WALLED)
def test_a_device_in_a_directory_that_is_shown_is_dead(wall: str) -> None:
    attack = Attack(
        "",
        "for name in ('null', 'zero', 'full', 'random'):\n  try: os.open(f'{T[\"top\"]}/{name}', os.O_RDONLY); won(name)\n  except PermissionError: pass",
    )
    outside(attack, {"top": "/dev"})
    held(inside(attack, wall, {"top": "/data"}, mounts=[Mount(source="/dev", target="/data")]))
    assert b"WON" in inside(attack, wall, {"top": "/dev"}).stdout  # its own


@pytest.mark.parametrize("wall", ["moderate", "no-filter", "bare"])
def test_no_program_in_or_below_what_is_shown_without_the_right_is_executed(wall: str, shared: Path) -> None:
    attack = Attack("", BELOW + "if os.spawnv(os.P_WAIT, top + '/program', ['program']) == 0: won()")
    outside(attack, {"top": "/dev", "name": shared.name})
    mounts = [Mount(source="/dev", target="/data", executable=False)]
    held(inside(attack, wall, {"top": "/data", "name": shared.name}, mounts=mounts))
    alone = [Mount(source=str(shared), target="/data/shm/x", executable=True)]
    assert b"WON" in inside(attack, wall, {"top": "/data", "name": "x"}, mounts=alone).stdout


def test_a_set_user_id_program_gives_nothing() -> None:
    """By nosuid, by no_new_privs, and because root is no user inside."""
    look = Attack(
        "",
        "import subprocess\nif subprocess.run([T['su'], '--version'], capture_output=True).returncode == 0: print('ran', flush=True)\nif [l for l in open('/proc/self/mountinfo') if 'nosuid' not in l.split(' - ')[0]]: won()",
    )
    su = next(path for path in ("/usr/bin/su", "/bin/su", "/usr/bin/passwd") if os.path.exists(path) and os.stat(path).st_mode & 0o4000)
    outside(look, {"su": su})
    for wall in ("trusted", "landlock-only"):
        assert b"ran" in held(inside(look, wall, {"su": su})).stdout
    for wall in EVERY_WALL:
        held(
            inside(look, wall, {"su": "/bin/true"})
            if wall not in ("untrusted", "no-landlock", "filter-only")
            else inside(Attack("", look.source.split("\n")[-1]), wall)
        )


def test_every_mount_is_private_and_none_is_the_old_root() -> None:
    source = Attack("", "for line in open('/proc/self/mountinfo'): print(line, end='', flush=True)")
    hosts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    for wall in EVERY_WALL:
        lines = [line for line in inside(source, wall).stdout.decode().splitlines() if line[:1].isdigit()]
        assert lines and not [line for line in lines if "shared:" in line or "master:" in line], wall
        root = next(line for line in lines if line.split()[4] == "/")
        assert " - tmpfs " in root and "ro" in root.split()[5].split(",")
        if wall not in ("trusted", "filter-only", "landlock-only"):
            assert not ({line.split()[4] for line in lines} & hosts) - {"/", "/dev/shm", "/dev/pts", "/proc", "/tmp"}


@pytest.mark.parametrize("link", ["absolute", "relative", "through proc"])
def test_a_link_in_a_root_leads_no_target_to_the_host(link: str, secret: Path) -> None:
    """Targets are made beneath the new root, whatever links lie on the way. Outside the same path is made where the link points."""
    top = Path(tempfile.mkdtemp(prefix="canary-root-"))
    top.chmod(0o755)
    elsewhere = secret.parent / f"elsewhere-{link.replace(' ', '-')}"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    try:
        for name in ("usr", "etc", "root"):
            (top / name).mkdir()
        text = {"absolute": str(elsewhere), "relative": "../" * 12 + str(elsewhere)[1:], "through proc": f"/proc/self/root{elsewhere}"}[
            link
        ]
        (top / "data").symlink_to(text)
        (top / "etc/data").symlink_to(text)
        os.makedirs(top / "data/made")
        assert os.listdir(elsewhere) == ["made"]
        (elsewhere / "made").rmdir()
        for target in ("/data/made", "/etc/data/made", "/data"):
            shown = [Mount(source="/usr", target="/usr"), Mount(source=str(secret), target=target)]
            with contextlib.suppress(JailError):  # refused, or made beneath the new root
                nsjail_py.run(["/bin/true"], policy="moderate", root=str(top), mounts=shown)
            assert os.listdir(elsewhere) == [], target
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("wall", EVERY_WALL)
def test_the_interpreter_and_the_launcher_cannot_be_written(wall: str) -> None:
    """By the path, by /proc/self/exe, by a descriptor of it, after another program has taken its place, and by init's."""
    attack = Attack(
        "",
        "exe = os.readlink('/proc/self/exe') if not T['outside'] else T['copy']\nfd = os.open('/proc/self/exe' if not T['outside'] else T['copy'], os.O_RDONLY)\nways = [exe, f'/proc/self/fd/{fd}'] + ([] if T['outside'] else ['/proc/self/exe', '/proc/1/exe', '/proc/self/map_files', *{line.split()[-1] for line in open('/proc/self/maps') if '/' in line}])\nfor path in ways:\n  for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):\n    try: os.open(path, flags); won(path)\n    except OSError as error:\n      if error.errno == errno.ENOENT and not path.startswith('/proc'): raise\n  for change in (lambda: os.chmod(path, 0o777), lambda: os.truncate(path, 0), lambda: os.unlink(path), lambda: os.utime(path)):\n    try: change(); won(path)\n    except OSError: pass",
    )
    with tempfile.TemporaryDirectory() as top:
        outside(attack, {"outside": True, "copy": shutil.copy("/bin/true", top)})
    held(inside(attack, wall, {"outside": False}))


def test_a_shown_directory_keeps_the_flags_that_it_has() -> None:
    """In a namespace of users a flag of the host's mount is locked: what the host says stays, whatever the policy does not forbid."""
    hosts = {line.split()[4]: line.split()[5] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    strict = [
        path
        for path, flags in hosts.items()
        if {"nosuid", "nodev", "ro"} <= set(flags.split(",")) and os.path.isdir(path) and path.count("/") < 9 and os.access(path, os.R_OK)
    ]
    for path in strict[:1] or ["/usr"]:
        source = Attack("", "print([l.split()[5] for l in open('/proc/self/mountinfo') if l.split()[4] == '/data'], flush=True)")
        flags = inside(source, "moderate", mounts=[Mount(source=path, target="/data")]).stdout.decode()
        assert "nosuid" in flags and "nodev" in flags and "ro," in flags
        with pytest.raises(OSError):
            Path(path, "new").write_text("x") if path in strict else open("/data/none")


@pytest.mark.parametrize("field", ["type", "fstype", "options", "data", "flags"])
def test_no_kind_of_file_system_is_mounted_on_a_callers_word(field: str) -> None:
    with pytest.raises((TypeError, PolicyError)):
        nsjail_py.run(
            ["/bin/true"], policy=replace(WALLS["moderate"], mounts=(Mount(source="/usr", target="/data", **{field: "overlay"}),))
        )


@pytest.mark.parametrize("target", ["/proc/x", "/dev/x", "/", "/work", "/tmp", "/data/../proc", "proc", "/proc"])
def test_no_mount_covers_what_is_the_jails_own(target: str) -> None:
    with pytest.raises(PolicyError):
        nsjail_py.run(["/bin/true"], policy="moderate", mounts=[Mount(source="/usr", target=target)])


def test_a_path_that_changes_between_check_and_mount_shows_what_was_mounted_or_nothing(secret: Path) -> None:
    """A link that is exchanged all the while never makes a read-only mount a writable one."""
    top = Path(tempfile.mkdtemp(prefix="canary-race-"))
    top.chmod(0o755)
    link = top / "link"
    link.symlink_to(secret.parent)
    swap = f"while :; do ln -sfn {secret.parent} {link}; ln -sfn /usr {link}; done"
    racer = subprocess.Popen(["timeout", "20", "sh", "-c", swap], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(15):
            attack = Attack(
                "",
                "for top, _, files in os.walk('/data'):\n  for name in ['new', *files[:3]]:\n    try: os.open(f'{top}/{name}', os.O_CREAT | os.O_WRONLY); won(name)\n    except OSError: pass\n  break",
            )
            with contextlib.suppress(JailError):  # it was exchanged in between
                held(inside(attack, "moderate", mounts=[Mount(source=str(link), target="/data")]))
    finally:
        os.killpg(racer.pid, 15)
        racer.wait()
        shutil.rmtree(top)
