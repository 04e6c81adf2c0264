"""vagrant/: the machines are well described, and each has its provisioning script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = ROOT / "vagrant"
SCRIPTS = sorted((FOLDER / "provision").glob("*.sh"))


def machines() -> dict[str, str]:
    return dict(re.findall(r'"(\w+)" => "([\w./-]+)"', (FOLDER / "Vagrantfile").read_text()))


def test_the_machines_are_those_that_are_promised() -> None:
    assert set(machines()) == {"debian12", "debian13", "ubuntu2404", "ubuntu2604", "fedora", "alpine"}


def test_every_machine_has_its_provisioning_script() -> None:
    for name in machines():
        assert (FOLDER / "provision" / f"{name.rstrip('0123456789')}.sh").exists(), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_posix_shell_and_stops_at_the_first_error(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\n") and "\nset -eu\n" in script.read_text()
    done = subprocess.run(["sh", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_debian_is_given_is_what_dev_would_install() -> None:
    """Or the image that ./dev vm makes, which has no network when it runs, would lack it."""
    given = set((FOLDER / "provision" / "debian.sh").read_text().split())
    lacking = re.search(r"^lacking\(\) \{(.*?)^}", (ROOT / "dev").read_text(), re.M | re.S)
    assert lacking
    for package in ("gcc", "libc6-dev", "libcap-dev", "libseccomp2"):
        assert package in lacking[1] and package in given


@pytest.mark.elsewhere(
    shutil.which("vagrant") is None and "CI" not in os.environ, why="vagrant is not installed (./dev test installs it where CI is set)"
)
def test_vagrant_finds_the_file_valid(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
    }
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"], cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
