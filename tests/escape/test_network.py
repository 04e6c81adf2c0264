"""The network inside is empty, and no socket leads out of it: not by family, by address, by name or by path."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import nsjail_py
from nsjail_py import PIPE, Jail, Mount
from nsjail_py.compiled import landlock_abi

from .runner import Attack, cases, fails, held, inside, outside

OWN_NET = ("untrusted", "moderate", "no-filter", "no-landlock", "bare")
NO_SOCKETS = (*OWN_NET, "filter-only")
NO_TCP = (*NO_SOCKETS, "landlock-only")
NO_KERNEL = ("untrusted", "moderate", "no-landlock", "filter-only")

REACH = [
    Attack("no TCP server of the host is reached", "socket.create_connection(('127.0.0.1', T['tcp']), 2)\nwon()", NO_TCP),
    Attack("no TCP server is reached by version 6", "socket.create_connection(('::1', T['tcp6']), 2)\nwon()", NO_TCP),
    Attack("no TCP server is reached by a mapped address", "s = socket.socket(socket.AF_INET6)\ns.connect(('::ffff:127.0.0.1', T['tcp']))\nwon()", NO_TCP),
    Attack("no TCP server is reached by fast open", "s = socket.socket()\ns.sendto(b'x', 0x20000000, ('127.0.0.1', T['tcp']))\ns.getpeername()\nwon()", NO_SOCKETS),
    Attack("no UDP server of the host is reached", "s = socket.socket(type=socket.SOCK_DGRAM)\ns.settimeout(0.3)\ns.connect(('127.0.0.1', T['udp']))\ns.send(b'x')\nif s.recv(9) == b'pong': won()", NO_SOCKETS),
    Attack("no abstract socket of the host is reached", "s = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + T['name'])\nwon()", NO_TCP),
    Attack("no datagram reaches an abstract socket of the host", "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\ns.sendto(b'x', '\\0' + T['name'] + '-d')\nwon()", NO_TCP),
    Attack("no path socket in a hidden directory is reached", "s = socket.socket(socket.AF_UNIX)\ns.connect(T['path'])\nwon()", (*NO_TCP, "trusted")),
    Attack("no sockets of the host are listed", "text = ''.join(open('/proc/net/' + f).read() for f in ('tcp', 'unix'))\nif T['name'] in text or '%04X' % T['tcp'] in text: won()", OWN_NET),
    Attack("no interface but the loopback is there", "if [n for _, n in socket.if_nameindex() if n != 'lo']: won()", OWN_NET),
    Attack("no route leads anywhere", "s = socket.socket(type=socket.SOCK_DGRAM)\ns.connect(('127.0.0.2' if T['outside'] else '192.0.2.1', 9))\nwon()", OWN_NET),
]  # fmt: skip

FAMILY = [
    Attack("no netlink", "socket.socket(16, 3, 0)\nwon()", NO_KERNEL),
    Attack("no socket of the kernel's cryptography", "socket.socket(38, 5, 0)\nwon()", NO_KERNEL),
    Attack("no virtual machine socket", "socket.socket(40, 1, 0)\nwon()", NO_KERNEL),
    Attack("no ping socket", "socket.socket(2, 2, 1)\nwon()", NO_KERNEL),
    Attack("no raw socket", "socket.socket(2, 3, 1)\nwon()", (*NO_KERNEL, "bare", "trusted"), True),
    Attack("no packet socket", "socket.socket(17, 3, 0)\nwon()", (*NO_KERNEL, "bare", "trusted"), True),
]  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Iterator[dict[str, object]]:
    """Servers of this test, on loopback, as abstract sockets and at a path."""
    import threading

    held_open = []
    name, top = f"nsjail-canary-{os.getpid()}", tempfile.mkdtemp(prefix="canary-")
    os.chmod(top, 0o777)
    tcp, tcp6 = socket.create_server(("127.0.0.1", 0)), socket.create_server(("::1", 0), family=socket.AF_INET6)
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    abstract, datagrams, path = (
        socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM)
    )
    abstract.bind(f"\0{name}")
    datagrams.bind(f"\0{name}-d")
    path.bind(f"{top}/socket")
    os.chmod(f"{top}/socket", 0o777)
    for server in (abstract, path):
        server.listen(64)
    held_open += [tcp, tcp6, udp, abstract, datagrams, path]

    def answer() -> None:
        while True:
            data, peer = udp.recvfrom(10)
            if data == b"end":
                return
            udp.sendto(b"pong", peer)

    thread = threading.Thread(target=answer)
    thread.start()
    port = udp.getsockname()[1]
    yield {
        "tcp": tcp.getsockname()[1],
        "tcp6": tcp6.getsockname()[1],
        "udp": port,
        "name": name,
        "path": f"{top}/socket",
        "top": top,
        "outside": True,
    }
    with socket.socket(type=socket.SOCK_DGRAM) as end:
        end.sendto(b"end", ("127.0.0.1", port))
    thread.join()
    for server in held_open:
        server.close()
    os.unlink(f"{top}/socket")
    os.rmdir(top)


def lack(attack: Attack, wall: str) -> str:
    needed = 4 if "TCP" in attack.promise else 6
    lacks = wall == "landlock-only" and landlock_abi() < needed
    return f"this kernel's Landlock cannot refuse it alone: ABI {needed} can" if lacks else ""


@cases(REACH, lack)
def test_reaching_out(attack: Attack, wall: str, target: dict[str, object]) -> None:
    wins = attack.promise != "no interface but the loopback is there" or len(socket.if_nameindex()) > 1
    fails(attack, wall, target, {**target, "outside": False}, wins=wins)


def exists(attack: Attack) -> bool:
    """Whether this kernel has the family, or would load it, at all: what it lacks cannot be shown outside."""
    import contextlib

    numbers = [int(number) for number in attack.source.split("(")[1].split(")")[0].split(",")]
    with contextlib.suppress(PermissionError):
        try:
            socket.socket(*numbers).close()
        except OSError as error:
            return error.errno == 1
    return True


@cases(FAMILY)
def test_a_family(attack: Attack, wall: str) -> None:
    """Of a family that this kernel lacks, the answer must still be the filter's and not the kernel's."""
    import errno

    if "ping" not in attack.promise and exists(attack):
        outside(attack)
    result = held(inside(attack, wall))
    assert os.strerror(errno.EPERM).encode() in result.stdout, result.stdout
    assert wall in ("bare", "trusted", "untrusted/alone") or result.denied == {"socket": 1}


SWEEP = "for family in range(0, 47):\n  for kind in (1, 2, 3, 4, 5, 6, 10):\n    for high in (0, 1 << 32, 0x800 | 0x80000):\n      try: os.close(call(41, family | (high & ~0xfff & ~0x80000), kind | (high & 0x80800), 0)); won((family, kind))\n      except OSError: pass"


@pytest.mark.parametrize(
    ("wall", "allowed"), [("untrusted", set()), ("no-landlock", set()), ("filter-only", set()), ("moderate", {1, 2, 10})]
)
def test_every_family_and_type_is_what_the_policy_says(wall: str, allowed: set[int]) -> None:
    """High bits of the family hide nothing, flags of the type change nothing."""
    outside(Attack("", SWEEP))
    seen = {eval(line[4:]) for line in inside(Attack("", SWEEP), wall).stdout.decode().splitlines() if line.startswith("WON")}
    assert {family for family, _ in seen} == allowed
    assert {kind for _, kind in seen} <= {1, 2, 5}


def test_a_server_inside_is_not_reached_from_outside() -> None:
    source = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with Jail("moderate").start_python(source, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 2)


def test_two_jails_do_not_meet() -> None:
    """Nor by an abstract name: each has a network of its own."""
    serve = "import socket; s = socket.create_server(('127.0.0.1', 45454)); a = socket.socket(socket.AF_UNIX); a.bind('\\0meet'); a.listen(); print('up', flush=True); input()"
    meet = "import socket\nfor family, at in ((2, ('127.0.0.1', 45454)), (1, '\\0meet')):\n  try: socket.socket(family).connect(at); print('WON')\n  except OSError: print('HELD')"
    with Jail("moderate").start_python(serve, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        assert nsjail_py.run_python(meet, policy="moderate").check().stdout == b"HELD\nHELD\n"
    together = serve.replace("input()", "") + "\n" + meet
    assert nsjail_py.run_python(together, policy="moderate").check().stdout.count(b"WON") == 2  # it does work where both are inside


@pytest.mark.parametrize("wall", ["untrusted", "no-filter"])
def test_a_socket_in_a_directory_that_is_shown_is_not_reached_under(wall: str, target: dict[str, object]) -> None:
    """By the filter; a Landlock that knows path sockets is newer than most kernels, so without the filter only the missing write bit."""
    top = str(target["top"])
    attack = Attack("", "s = socket.socket(socket.AF_UNIX)\ns.connect(T['top'] + '/socket')\nwon()")
    outside(attack, {"top": top})
    if wall == "no-filter":
        os.chmod(f"{top}/socket", 0o700 if os.geteuid() == 0 else 0o500)
    held(inside(attack, wall, {"top": "/data"}, mounts=[Mount(source=top, target="/data")]))
    os.chmod(Path(top, "socket"), 0o777)


def test_the_name_of_the_host_is_its_own() -> None:
    for level in ("untrusted", "moderate"):
        assert nsjail_py.run_python("import socket; print(socket.gethostname())", policy=level).check().stdout == b"jail\n"
    renaming = Attack("", "socket.sethostname('won')\nwon()", rights=True)
    for wall in ("untrusted", "moderate", "trusted", "bare"):
        fails(renaming, wall)
