#!/bin/sh
# Fedora, as root. SELinux stays as it is: enforcing.
set -eu
dnf -q -y install python3 python3-devel gcc glibc-devel glibc-static libcap-devel libseccomp util-linux
here=$(dirname -- "$0")
sh "$here/systemd.sh"
sh "$here/venv.sh"
