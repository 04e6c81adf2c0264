#!/bin/sh
# Fedora, as root. SELinux stays as it is: enforcing.
set -eu
dnf -q -y install python3 python3-devel gcc glibc-devel glibc-static libcap-devel libseccomp util-linux
# CPython's own tests, which run inside, too.
dnf -q -y install python3-test
here=$(dirname -- "$0")
sh "$here/systemd.sh"
sh "$here/venv.sh"
