"""Files of the host are reached by no path, no descriptor, no handle and no mount."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT

from nsjail_py import hostinfo

from .runner import Attack, cases, fails, held, inside, outside, with_starts

READ = "\nfor path in paths:\n  try:\n    if 's3cret' in open(path).read(): won(path)\n  except OSError: pass\n"
HIDDEN = ("untrusted", "moderate", "trusted", "no-filter", "no-landlock", "bare", "filter-only", "landlock-only")
NO_RIGHTS = ("untrusted", "moderate", "trusted", "no-filter", "no-landlock", "bare", "filter-only")

PATHS = [
    Attack("a hidden file is not at its own path", "paths = [T['secret']]" + READ, HIDDEN),
    Attack("a hidden file is not below the root of any process", "paths = [f'/proc/{p}/root{T[\"secret\"]}' for p in os.listdir('/proc')]" + READ, HIDDEN),
    Attack("a hidden file is not below the directory of any process", "paths = [f'/proc/{p}/cwd/' + '../' * 30 + T['secret'] for p in os.listdir('/proc')]" + READ, HIDDEN),
    Attack("dot dot ends at the root", "paths = [f'{top}/' + '../' * n + T['secret'] for top in ('/tmp', '/dev/pts', '/proc/self', '/dev/fd', '.') for n in range(30)]" + READ, HIDDEN),
    Attack("a symbolic link leads to nothing outside", "name = f'/tmp/link-{os.getpid()}'\nos.symlink(T['secret'], name)\npaths = [name, f'/proc/self/root{name}']" + READ + "os.unlink(name)", HIDDEN),
    Attack("a chain of links through proc leads to nothing outside", "name = f'/tmp/chain-{os.getpid()}'\nos.symlink('/proc/self/root', name)\npaths = [name + T['secret'], name + name + T['secret']]" + READ + "os.unlink(name)", HIDDEN),
    Attack("no hard link to a hidden file can be made", "os.link(T['secret'], T['scratch'] + '/hard')\npaths = [T['scratch'] + '/hard']" + READ + "os.unlink(paths[0])", HIDDEN),
    Attack("a hidden file cannot be renamed to a place inside", "os.rename(T['secret'], T['scratch'] + '/moved')\nwon()\nos.rename(T['scratch'] + '/moved', T['secret'])", HIDDEN),
    Attack("a hidden file cannot be written", "open(T['secret'], 'r+').write('s3cret')\nwon()", HIDDEN),
    Attack("a hidden file is not even known to exist", "os.stat(T['secret'])\nwon()", HIDDEN),
]  # fmt: skip

MOUNT = "def mount(what, where, kind, flags=0, data=None):\n  if libc.mount(what, where, kind, flags, data): raise OSError(ctypes.get_errno(), 'mount')\n"
HERE = "here = T['scratch'].encode()\n"

RIGHTS = [
    Attack("chroot twice does not leave the root", "d = f'/tmp/d{os.getpid()}'\nos.mkdir(d)\ntop = os.open('/', os.O_RDONLY)\nos.chroot(d)\nos.fchdir(top)\nfor i in range(30): os.chdir('..')\nos.chroot('.')\nos.rmdir(d)\npaths = [T['secret']]" + READ, NO_RIGHTS, True),
    Attack("nothing can be mounted", MOUNT + HERE + "mount(b'none', here, b'tmpfs')\nwon()", NO_RIGHTS, True),
    Attack("nothing can be bound elsewhere", MOUNT + HERE + "mount(b'/usr', here, None, 0x5000)\nwon()", NO_RIGHTS, True),
    Attack("read-only cannot be taken off by a remount", MOUNT + HERE + "try: mount(b'/usr', here, None, 0x5000)\nexcept OSError: here = b'/usr'\nmount(None, here, None, 0x1020)\nwon()", NO_RIGHTS, True),
    Attack("nothing can be unmounted", MOUNT + HERE + "try: mount(b'none', here, b'tmpfs')\nexcept OSError: pass\nfor path in (here, b'/proc', b'/dev/shm', b'/work', b'/tmp', b'/usr'):\n  for flags in (0, 2, 8): won(path) if libc.umount2(path, flags) == 0 else None", NO_RIGHTS, True),
    Attack("propagation cannot be changed", MOUNT + "mount(None, b'/', None, 0x40000 | 0x4000)\nwon()", NO_RIGHTS, True),
    Attack("pivot_root is refused", MOUNT + HERE + "try: mount(b'none', here, b'tmpfs')\nexcept OSError: pass\nos.chdir(here)\ncall(155, b'.', b'.')\nwon()", NO_RIGHTS, True),
    Attack("fsopen is refused", "fd = call(430, b'tmpfs', 0)\nwon()", NO_RIGHTS, True),
    Attack("a file system cannot be made by descriptors", HERE + "fd = call(430, b'tmpfs', 0)\ncall(431, fd, 6, None, None, 0)\nm = call(432, fd, 0, 0)\ncall(429, m, b'', -100, here, 4)\nwon()", NO_RIGHTS, True),
    Attack("a tree of mounts cannot be cloned", "call(428, -100, b'/usr', 0x88001)\nwon()", NO_RIGHTS, True),
    Attack("flags of mounts cannot be changed", HERE + MOUNT + "try: mount(b'/usr', here, None, 0x5000)\nexcept OSError: here = b'/usr'\ncall(442, -100, here, 0, struct.pack('QQQQ', 0, 1, 0, 0), 32)\nwon()", NO_RIGHTS, True),
    Attack("no file handle is opened", MOUNT + HERE + """
handle, base = bytes.fromhex(T['handle']), '/usr'
try:
    mount(b'none', here, b'tmpfs')
    base = T['scratch']
    open(base + '/secret', 'w').write('s3cret')
    buffer, number = ctypes.create_string_buffer(struct.pack('Ii', 128, 0), 136), ctypes.c_int()
    if libc.name_to_handle_at(-100, base.encode(), buffer, ctypes.byref(number), 0): raise OSError(ctypes.get_errno(), 'name_to_handle_at')
    handle = buffer.raw
except OSError: pass
for top in (base, '/', '/work', '/dev/null'):
    try: fd = call(304, os.open(top, os.O_RDONLY), handle, os.O_DIRECTORY)
    except OSError: continue
    if b's3cret' in os.read(os.open('secret', os.O_RDONLY, dir_fd=fd), 100): won()
""", NO_RIGHTS, True),
    Attack("no namespace can be entered", """
child = os.fork() if T['fork'] else -1
if child == 0:
    libc.unshare(0x04000000); time.sleep(3); os._exit(0)
time.sleep(0.1 if T['fork'] else 0)
mine = {name: os.readlink('/proc/self/ns/' + name) for name in os.listdir('/proc/self/ns')}
for pid in os.listdir('/proc'):
    for name in mine:
        try:
            link = f'/proc/{pid}/ns/{name}'
            if os.readlink(link) != mine[name] and 'children' not in name:
                call(308, os.open(link, os.O_RDONLY), 0)
                won(link)
        except OSError: pass
if child > 0: os.kill(child, 9)
""", NO_RIGHTS, True),
]  # fmt: skip

USER = [
    Attack("unshare makes no user namespace", "call(272, 0x10000000)\nwon()", (*NO_RIGHTS, "landlock-only")),
    Attack("clone makes no user namespace", "pid = call(56, 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nwon()", (*NO_RIGHTS, "landlock-only")),
    Attack("clone3 makes no user namespace", "pid = call(435, struct.pack('Q3QQ3Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)\nif pid == 0: os._exit(0)\nwon()", (*NO_RIGHTS, "landlock-only")),
    Attack("no mount namespace is made on the way over a user namespace", "call(272, 0x10000000 | 0x00020000)\nwon()", (*NO_RIGHTS, "landlock-only")),
]  # fmt: skip


@pytest.fixture(scope="module")
def target(secret: Path) -> dict[str, object]:
    """The hidden file, its handle, and a directory beside it."""
    scratch = secret.parent / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)
    return {"secret": str(secret), "scratch": str(scratch), "handle": handle_of(secret.parent), "fork": True}


def handle_of(path: Path) -> str:
    import ctypes
    import struct

    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    assert ctypes.CDLL(None).name_to_handle_at(-100, os.fsencode(path), buffer, ctypes.byref(ctypes.c_int()), 0) == 0
    return buffer.raw.hex()


@cases(PATHS)
def test_a_path(attack: Attack, wall: str, target: dict[str, object]) -> None:
    fails(attack, wall, target, {**target, "scratch": "/tmp"})


@cases(RIGHTS)
def test_rights(attack: Attack, wall: str, target: dict[str, object]) -> None:
    # Before Linux 6.11 no right in a user namespace opens a handle.
    wins = IS_ROOT or hostinfo.probe().kernel >= (6, 11, 0) or attack.promise != "no file handle is opened"
    fails(attack, wall, target, {**target, "scratch": "/tmp", "fork": False}, wins=wins)


@cases(USER)
def test_a_user_namespace(attack: Attack, wall: str) -> None:
    fails(attack, wall)


LEAK = Attack(
    "a directory that the caller left open is not there",
    "for fd in range(3, 1100):\n  try:\n    if b's3cret' in os.read(os.open('secret', os.O_RDONLY, dir_fd=fd), 100): won(fd)\n  except OSError: pass",
)


@pytest.mark.parametrize("wall", with_starts(HIDDEN))
def test_an_inherited_directory_opens_nothing(wall: str, secret: Path) -> None:
    leak = os.open(secret.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.set_inheritable(leak, True)
        outside(LEAK, {}, close_fds=False)
        held(inside(LEAK, wall))
    finally:
        os.close(leak)


CHANGES = [
    Attack("write", "open(T['data'] + '/file', 'r+').write('x')\nwon()"),
    Attack("truncate", "os.truncate(T['data'] + '/file', 0)\nwon()"),
    Attack("create", "open(T['data'] + '/new', 'x')\nwon()\nos.unlink(T['data'] + '/new')"),
    Attack("delete", "os.unlink(T['data'] + '/file')\nwon()\nopen(T['data'] + '/file', 'w')"),
    Attack("rename", "os.rename(T['data'] + '/file', T['data'] + '/other')\nwon()\nos.rename(T['data'] + '/other', T['data'] + '/file')"),
    Attack("make a directory in", "os.mkdir(T['data'] + '/d')\nwon()\nos.rmdir(T['data'] + '/d')"),
    Attack("make a link in", "os.symlink('x', T['data'] + '/l')\nwon()\nos.unlink(T['data'] + '/l')"),
    Attack("make a pipe in", "os.mkfifo(T['data'] + '/p')\nwon()\nos.unlink(T['data'] + '/p')"),
    Attack("set the times of", "os.utime(T['data'] + '/file')\nwon()"),
    Attack("set the mode of", "os.chmod(T['data'] + '/file', 0o666)\nwon()"),
    Attack("set the mode through a descriptor of", "os.fchmod(os.open(T['data'] + '/file', os.O_RDONLY), 0o666)\nwon()"),
    Attack("give away", "os.chown(T['data'] + '/file', os.getuid(), os.getgid())\nwon()"),
    Attack("set attributes of", "os.setxattr(T['data'] + '/file', 'user.x', b'x')\nwon()\nos.removexattr(T['data'] + '/file', 'user.x')"),
    Attack("map and write", "m = mmap.mmap(os.open(T['data'] + '/file', os.O_RDWR), 1)\nm[0] = 120\nwon()"),
    Attack("write by proc self fd", "fd = os.open(T['data'] + '/file', os.O_RDONLY)\nos.write(os.open(f'/proc/self/fd/{fd}', os.O_WRONLY), b'x')\nwon()"),
    Attack("write by a path descriptor of", "fd = os.open(T['data'] + '/file', os.O_PATH)\nos.write(os.open(f'/proc/self/fd/{fd}', os.O_WRONLY), b'x')\nwon()"),
]  # fmt: skip


@pytest.fixture
def data() -> Iterator[Path]:
    """A directory that everybody may change, outside."""
    with tempfile.TemporaryDirectory(prefix="canary-", dir="/var/tmp") as name:
        path = Path(name)
        path.chmod(0o777)
        (path / "file").write_text("some bytes")
        (path / "file").chmod(0o666)
        yield path


@pytest.mark.parametrize("wall", ["moderate", "no-filter", "bare", "trusted"])
@pytest.mark.parametrize("attack", CHANGES, ids=lambda attack: attack.promise.replace(" ", "_"))
def test_what_is_shown_read_only_cannot_be_changed(attack: Attack, wall: str, data: Path) -> None:
    """By the mount alone in `bare`, at its target and, where the host's root is shown, at its own path."""
    from nsjail_py import Mount

    fails(attack, wall, {"data": str(data)}, {"data": "/data"}, mounts=[Mount(source=str(data), target="/data")])
    before = sorted(os.listdir(data)), (data / "file").read_text(), (data / "file").stat().st_mode
    if wall == "trusted":
        held(inside(attack, wall, {"data": str(data)}))
    assert before == (sorted(os.listdir(data)), (data / "file").read_text(), (data / "file").stat().st_mode)
