"""`./dev vm-box`: the image of a test machine as a box for Vagrant's libvirt provider, with its kernel in it. It needs nothing from the network."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import images
from images import TroubleError
from machine import SECURITY, Machine

# The box has no modules but those of its initrd; networkd and sshd sleep in the image, since ./dev vm does without them.
COMMAND_LINE = (
    "console=ttyS0 quiet mitigations=off net.ifnames=0 random.trust_cpu=on "
    "systemd.wants=ssh.service systemd.wants=systemd-networkd.service systemd.mask=vm-job.service"
)
VAGRANTFILE = """Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |machine|
    machine.driver = "qemu"
    machine.cpu_mode = "custom"
    machine.cpu_model = "Nehalem"
    machine.kernel = File.join(__dir__, "vmlinuz")
    machine.initrd = File.join(__dir__, "initrd")
    machine.cmd_line = "{command_line}"
    machine.graphics_type = "none"
    machine.video_type = "none"
  end
end
"""


def make(which: Machine, target: Path) -> int:
    """Writes the box, or leaves what was there."""
    disk, kernel = images.root(which.distro), images.kernel(which.kernel)
    with tempfile.TemporaryDirectory(prefix="run-", dir=images.CACHE) as name:
        work = Path(name)
        (work / "metadata.json").write_text(json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": 5}))
        (work / "Vagrantfile").write_text(VAGRANTFILE.format(command_line=f"{COMMAND_LINE} {SECURITY[images.security(which.distro)]}"))
        for part_of_kernel in ("vmlinuz", "initrd"):
            shutil.copy(kernel / part_of_kernel, work)
        converted = subprocess.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, work / "box.img"], capture_output=True, text=True, check=False
        )
        if converted.returncode:
            raise TroubleError(f"qemu-img failed: {converted.stderr.strip()}")
        part = target.with_name(target.name + ".part")
        try:
            with tarfile.open(part, "w:gz", compresslevel=1) as box:
                for file in sorted(work.iterdir()):
                    box.add(file, file.name)
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
    images.say(f"{target}: vagrant box add --name nsjail_py-local {target}")
    return 0
