"""Builds what is not Python: the cffi extension, the static launcher, and the copy of policies/ that goes into the package."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
FLAGS = "-static -O2 -Wall -Wextra -D_GNU_SOURCE -fstack-protector-strong -D_FORTIFY_SOURCE=2 -fno-strict-aliasing"


class BuildNative(build_ext):
    """The launcher is an executable of its own: static, so that nothing of the host's libraries is between it and the kernel."""

    def run(self) -> None:
        super().run()
        target = (HERE if self.inplace else Path(self.build_lib)) / "nsjail_py" / "nsjail-launcher"
        sources = sorted(path for path in (HERE / "native").glob("*.c") if path.name != "probe.c")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*shlex.split(os.environ.get("CC", "gcc")), *FLAGS.split(), *shlex.split(os.environ.get("CFLAGS", ""))]
        subprocess.run([*command, "-o", str(target), *map(str, sources)], check=True)
        target.chmod(0o755)


class BuildPython(build_py):
    """policies/ stands at the top of the project, where people look for it, and inside the package, where programs do."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "nsjail_py" / "policies"
        target.mkdir(parents=True, exist_ok=True)
        for path in (HERE / "policies").glob("*.toml"):
            shutil.copy(path, target)


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.11 on: the extension keeps to the stable ABI."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp311"
        super().finalize_options()


setup(cffi_modules=["native/build_native.py:ffibuilder"], cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": Wheel})
