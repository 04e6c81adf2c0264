"""Two AppArmor profiles to install: one lets our launcher make user namespaces where the host restricts them, one is a sample for programs.

    nsjail-py apparmor launcher | sudo tee /etc/apparmor.d/nsjail-launcher >/dev/null
    sudo apparmor_parser -r /etc/apparmor.d/nsjail-launcher

apparmor.d(5), apparmor_parser(8)
"""

from __future__ import annotations

import re
import unicodedata

from .errors import PolicyError
from .launcher import PROGRAM

FILE = "/etc/apparmor.d/nsjail-launcher"
INSTALL = f"nsjail-py apparmor launcher | sudo tee {FILE} >/dev/null && sudo apparmor_parser -r {FILE}"
LAUNCHER = """\
# Ubuntu 24.04 and later refuse user namespaces with rights in them to programs without a profile that names them.
# This names the launcher of nsjail_py and restricts nothing else. Whoever may execute it may have a user namespace then.
abi <abi/4.0>,
include <tunables/global>

profile nsjail-launcher "{program}" flags=(unconfined) {{
  userns,
  include if exists <local/nsjail-launcher>
}}
"""
SAMPLE = """\
# A sample for what runs inside: apparmor = "nsjail-payload" in a policy. It says once more what namespaces and mounts say already.
abi <abi/3.0>,
include <tunables/global>

profile nsjail-payload flags=(attach_disconnected) {
  # Programs and libraries, wherever the jail shows them; never what was written inside.
  / r,
  /** rmix,
  deny /{work,tmp,dev/shm}/** mx,

  # What is its own.
  /{work,tmp,dev/shm}/ rw,
  /{work,tmp,dev/shm}/** rwlk,
  /dev/{null,zero,full,random,urandom,tty,ptmx} rw,
  /dev/pts/* rw,
  owner @{PROC}/@{pid}/** rw,

  # Signals from outside end it, and its processes may send each other theirs.
  signal (receive),
  signal (send) peer=nsjail-payload,
  unix (create, send, receive, getattr, getopt, setopt, shutdown) type=stream,
  unix (create, send, receive, getattr, getopt, setopt, shutdown) type=dgram,

  # No capability, mount, ptrace or network: what is not named is refused.
  include if exists <local/nsjail-payload>
}
"""


def profile(name: str) -> str:
    """The text of `launcher`, which names where ours is, or of `sample`. Raises PolicyError for a path that no profile can name."""
    return SAMPLE if name == "sample" else LAUNCHER.format(program=_literal(str(PROGRAM.resolve())))


def _literal(path: str) -> str:
    """What a profile is attached to is a pattern, with variables: no letter of the path is part of any."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path):
        raise PolicyError(f"{path!a}: an AppArmor profile names no path with control characters, and UTF-8 only")
    return re.sub(r'[\\"*?\[\]{}^@]', r"\\\g<0>", path)
