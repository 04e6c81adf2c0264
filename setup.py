"""The two things that setuptools cannot build by itself: the launcher, and the policies as package data.

pyproject.toml holds everything else; native/build_native.py describes the extension `nsjail_py._native`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NATIVE = Path("native")
EXTENSION_ONLY = {"probe.c"}
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra"]
HARDENING = ["-O2", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-ffunction-sections", "-Wl,--gc-sections", "-Wl,-z,noexecstack"]


class BuildNative(build_ext):
    """The extension, and beside it the launcher: one static executable, so that nothing of the host is loaded into it."""

    def run(self) -> None:
        super().run()
        package = Path("nsjail_py") if self.inplace else Path(self.build_lib, "nsjail_py")
        self.build_launcher(package / "nsjail-launcher")

    def build_launcher(self, target: Path) -> None:
        """Compile `target` unless it is newer than every source; a launcher that is running is replaced, not overwritten."""
        sources = sorted(path for path in NATIVE.glob("*.c") if path.name not in EXTENSION_ONLY)
        newest = max(path.stat().st_mtime for path in (*sources, *NATIVE.glob("*.h"), Path(__file__)))
        if not self.force and target.exists() and target.stat().st_mtime >= newest:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(target.name + ".new")
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        flags = [*HARDENING, *shlex.split(os.environ.get("CFLAGS", "")), *WARNINGS]
        # Not every compiler links a static program that is also position-independent.
        for static in ("-static-pie", "-static"):
            position = ["-fPIE"] if static == "-static-pie" else []
            command = [*compiler, *flags, *position, static, "-o", str(fresh), *map(str, sources)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0 and subprocess.run(["strip", "-s", str(fresh)], check=False).returncode in (0, 127):
                break
        else:
            sys.exit(f"{shlex.join(command)}\n{done.stderr}")
        fresh.chmod(0o755)
        fresh.replace(target)
