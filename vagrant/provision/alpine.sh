#!/bin/sh
# Alpine, as root: musl, and OpenRC instead of systemd, so control groups are mounted by hand and belong to root alone.
set -eu
apk add --quiet python3 python3-dev py3-pip gcc musl-dev linux-headers libcap-dev libseccomp flock
sed -i 's/^#* *rc_cgroup_mode=.*/rc_cgroup_mode="unified"/' /etc/rc.conf
rc-update -q add cgroups default
rc-service -q cgroups restart
sh "$(dirname -- "$0")/venv.sh"
