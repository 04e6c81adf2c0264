#!/bin/sh
# The virtual environment of this machine lies outside of /src, which may be shared with a host that has one of its own.
set -eu
mkdir -p /opt/nsjail_py
[ -z "${SUDO_USER:-}" ] || chown "$SUDO_USER" /opt/nsjail_py
grep -qs '^DEV_VENV=' /etc/environment || echo 'DEV_VENV=/opt/nsjail_py/venv' >>/etc/environment
echo 'export DEV_VENV=/opt/nsjail_py/venv' >/etc/profile.d/nsjail_py.sh
