#!/bin/sh
# Debian, as root: what ./dev test would install by itself, so that it finds everything there. ./dev vm runs this too, in the image that it makes.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev libcap-dev libseccomp2
# CPython's own tests, which run inside, too.
apt-get install -qq -y --no-install-recommends "libpython$(python3 -c 'import sys; print("3.%d" % sys.version_info[1])')-testsuite"
here=$(dirname -- "$0")
sh "$here/systemd.sh"
sh "$here/venv.sh"
