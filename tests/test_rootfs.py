"""The order of the mount steps is a promise: no target is ever made inside something that was mounted, and none leads out of the new root."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import nsjail_py
from nsjail_py import Jail, Mount, compiled
from nsjail_py._native import lib

MADE = {lib.MOUNT_DIRECTORY, lib.MOUNT_FILE, lib.MOUNT_SYMLINK}


def test_every_target_is_made_before_anything_is_mounted(level: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    mounts = [Mount(source=str(tmp_path / name), target=f"/shown/{name}") for name in ("data", "file")]
    jail = Jail(level, mounts=mounts, workdir=str(tmp_path / "data"))
    for made in (compiled.for_program(jail.policy, jail._host(), "/bin/true"), compiled.for_python(jail.policy, jail._host())):
        kinds = [step.kind in MADE for step in made.mounts]
        assert kinds == sorted(kinds, reverse=True)
        assert {"/shown/data", "/shown/file", "/work"} <= {step.target for step in made.mounts if step.kind in MADE}


@pytest.mark.parametrize("text", ["/canary", "../../../../../../canary", "{outside}", "/proc/self/root{outside}"])
def test_a_link_in_the_root_leads_no_target_out_of_it(text: str, tmp_path: Path) -> None:
    """A mount goes to a place below the link: it is found inside, or there is no jail. [bubblewrap CVE-2026-87766]"""
    outside, tree, other = (tmp_path / name for name in ("outside", "root/tree", "other"))
    for path in (outside, tree, other):
        path.mkdir(parents=True)
    (tree / "link").symlink_to(text.format(outside=outside))
    with pytest.raises(nsjail_py.SetupError) as refused:
        nsjail_py.run(["/bin/true"], policy="moderate", root=str(tree.parent), mounts=[Mount(source=str(other), target="/tree/link/new")])
    assert refused.value.step == "mount bind"
    assert refused.value.errno in (errno.ENOENT, errno.ELOOP)  # a link of /proc's own kind is not followed at all
    assert list(outside.iterdir()) == []
    assert not Path("/canary").exists()
