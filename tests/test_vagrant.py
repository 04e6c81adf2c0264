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


# What ./dev calls by Debian's names, as each distribution calls it. Alpine's C library fails some of CPython's own tests: they are not run there.
GIVEN = {
    "debian": ("gcc", "libc6-dev", "libcap-dev", "libseccomp2", "-testsuite"),
    "fedora": ("gcc", "glibc-static", "libcap-devel", "libseccomp", "python3-test"),
    "alpine": ("gcc", "musl-dev", "libcap-dev", "libseccomp"),
}


@pytest.mark.parametrize("distribution", GIVEN)
def test_a_machine_is_given_what_dev_would_install(distribution: str) -> None:
    """Or the image that ./dev vm makes, which has no network when it runs, would lack it; and elsewhere ./dev cannot install it."""
    given = (FOLDER / "provision" / f"{distribution}.sh").read_text()
    lacking = re.search(r"^lacking\(\) \{(.*?)^lacking_for_vm", (ROOT / "dev").read_text(), re.M | re.S)
    assert lacking
    for package, of_debian in zip(GIVEN[distribution], GIVEN["debian"], strict=False):
        assert of_debian in lacking[1] and re.search(rf"{package}\b", given), package


def test_where_there_is_no_apt_the_suite_does_without_what_it_can_do_without(tmp_path: Path) -> None:
    """CPython's own tests, and runtimes to compare with. An interpreter and a compiler that have everything else stand in front; then no compiler."""
    functions = (ROOT / "dev").read_text().partition("\n# set -e does not hold")[0].replace("/usr/bin/", f"{tmp_path}/")
    for name, text in {"python3": "case $2 in *print*) echo 3.11 ;; esac", "python3.11": "exit 1", "gcc": "exit 0", "id": "echo 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("dirname", "sort"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    command = ["/bin/sh", "-c", f"{functions}\ninstall_packages test", str(ROOT / "dev")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "gcc").unlink()
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("dev: missing: gcc libc6-dev libcap-dev. So Debian names these packages")


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
