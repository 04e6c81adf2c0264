"""The two things that setuptools cannot build by itself: the launcher, and the policies as package data.

pyproject.toml holds everything else; native/build_native.py describes the extension `nsjail_py._native`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

PACKAGE = "nsjail_py"
LAUNCHER = "nsjail-launcher"
NATIVE = Path("native")
EXTENSION_ONLY = {"probe.c", "template.c", "snapshot.c", "audit.c"}
LAUNCHER_ONLY = {
    "launcher.c",
    "shelf.c",
    "cell.c",
    "run.c",
    "cgroup.c",
    "clocks.c",
    "denials.c",
    "observe.c",
    "tree.c",
    "labelled.c",
    "probe.c",
    "alone.c",
    "command.c",
    "claim.c",
    "relay.c",
    "saved.c",
}
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"]
TEMPLATE = Extension(
    "nsjail_py._template",
    sorted(str(path) for path in NATIVE.glob("*.c") if path.name not in LAUNCHER_ONLY | {"audit.c"}),
    extra_compile_args=FLAGS,
    define_macros=[("_GNU_SOURCE", None)],
    py_limited_api=True,
)
"""Loaded inside, by the interpreters that jobs are forked from; so it is for any of them from 3.11 on."""
AUDIT = Extension(
    "nsjail_py._audit", ["native/audit.c"], extra_compile_args=FLAGS, define_macros=[("_GNU_SOURCE", None)], py_limited_api=True
)
"""Loaded inside, too, where a policy wants telemetry."""
DIALECT = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra"]
HARDENING = ["-O2", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,-z,noexecstack", "-s"]
STATIC = (["-static-pie", "-fPIE"], ["-static"])  # not every compiler can do the first, which also loads at a random address


class BuildNative(build_ext):
    """The extension, and beside it the launcher: one static executable, so that nothing of the host is loaded into it."""

    def run(self) -> None:
        super().run()
        self.build_launcher(self.package_directory() / LAUNCHER)

    def package_directory(self) -> Path:
        return Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.package_directory() / LAUNCHER)]

    def build_launcher(self, target: Path) -> None:
        """Compile `target` unless it is newer than every source. A launcher that is running is replaced, never overwritten."""
        sources = sorted(path for path in NATIVE.glob("*.c") if path.name not in EXTENSION_ONLY)
        newest = max(path.stat().st_mtime for path in (*sources, *NATIVE.glob("*.h"), Path(__file__)))
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{LAUNCHER}.new")
        compiler = [*shlex.split(os.environ.get("CC", "gcc")), *HARDENING, *shlex.split(os.environ.get("CFLAGS", "")), *DIALECT]
        for static in STATIC:
            command = [*compiler, *static, "-o", str(fresh), *map(str, sources)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise CompileError(f"{shlex.join(command)}\n{done.stderr}")
        fresh.chmod(0o755)
        fresh.replace(target)


class BuildWithPolicies(build_py):
    """policies/*.toml become nsjail_py/policies; a source checkout reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, PACKAGE, "policies")
        target.mkdir(parents=True, exist_ok=True)
        for policy in sorted(Path("policies").glob("*.toml")):
            shutil.copy(policy, target)


setup(
    ext_modules=[TEMPLATE, AUDIT],
    cffi_modules=["native/build_native.py:ffibuilder"],
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithPolicies},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
