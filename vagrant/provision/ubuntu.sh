#!/bin/sh
# Ubuntu, as root: as Debian, and ordinary users may make user namespaces with rights in them, which Ubuntu 24.04 and later refuse by default.
set -eu
sh "$(dirname -- "$0")/debian.sh"
setting=kernel.apparmor_restrict_unprivileged_userns
if [ -e "/proc/sys/kernel/${setting#kernel.}" ]; then
    echo "$setting=0" >/etc/sysctl.d/60-nsjail_py.conf
    sysctl -q -p /etc/sysctl.d/60-nsjail_py.conf
fi
