#!/bin/sh
# build-root.sh SUITE apparmor|selinux OUT.img CHECKOUT: a Debian with systemd, made ready by vagrant/provision/debian.sh, as one ext4 image. As root.
# build-root.sh --inside ROOT CHECKOUT: the part that mmdebstrap calls back, when the base system is there.
# Stages are told on standard output, everything else on standard error.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

# What a machine has that somebody else set up; what the project needs comes from the provisioning script.
base=systemd-sysv,mount,dbus,dbus-user-session,libpam-systemd,udev,kmod,procps,iproute2,login,passwd,sudo,openssh-server,rsync,ca-certificates
# What only costs time in a machine that lives for minutes.
useless="apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer
    systemd-timesyncd.service systemd-pstore.service getty@tty1.service serial-getty@ttyS0.service systemd-journal-flush.service
    systemd-hwdb-update.service systemd-random-seed.service systemd-networkd-wait-online.service systemd-update-utmp.service
    systemd-binfmt.service ldconfig.service systemd-journal-catalog-update.service systemd-update-done.service
    ssh.service ssh.socket systemd-networkd.service tmp.mount" # Debian 13 has /tmp in memory, of which there is little here

packages_of() {
    case $1 in
        apparmor) echo apparmor ;;
        selinux) echo selinux-policy-default,policycoreutils ;;
    esac
}

inside() {
    root=$1 checkout=$2
    install -D -m755 "$here/guest/vm-job" "$root/usr/local/sbin/vm-job"
    install -D -m644 "$here/guest/vm-job.service" "$root/etc/systemd/system/vm-job.service"
    ln -sf ../vm-job.service "$root/etc/systemd/system/multi-user.target.wants/vm-job.service"
    echo test-machine >"$root/etc/hostname"
    printf '127.0.0.1 localhost test-machine\n::1 localhost\n' >"$root/etc/hosts"
    printf '/dev/vda / ext4 rw,noatime 0 0\n' >"$root/etc/fstab"
    printf '0123456789abcdef0123456789abcdef\n' >"$root/etc/machine-id" # set, or each boot is a first boot
    # shellcheck disable=SC2086 # one word, one unit
    for unit in $useless; do
        case $unit in
            ssh* | *networkd.service) rm -f "$root"/etc/systemd/system/*.wants/"$unit" ;; # a Vagrant box wants them by its command line
            *) ln -sf /dev/null "$root/etc/systemd/system/$unit" ;;
        esac
    done
    mkdir -p "$root/usr/lib/modules" "$root/src"
    chroot "$root" useradd -m -s /bin/bash -u 1000 tester
    as_box "$root"

    cp -a "$checkout/." "$root/src/"
    # The build's pip trusts whom this machine's pip trusts, and asks the index that it asks.
    [ -z "${PIP_CERT:-}" ] || cp "$PIP_CERT" "$root/tmp/certificates"
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
        ${PIP_CERT:+PIP_CERT=/tmp/certificates} ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"} \
        sh /src/tests/vm/in-root.sh >&2
    # From here on there is no network: a test that installs what we depend on finds it here.
    printf '[global]\nno-index = true\nfind-links = /opt/nsjail_py/wheels\n' >"$root/etc/pip.conf"
    rm -rf "$root/src" "$root/tmp/certificates" "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/archives/*.deb
    mkdir "$root/src"
    [ ! -d "$root/etc/selinux/default" ] || labelled "$root"
}

# Every file has its label before the first boot, which would otherwise be two, with a long walk between them.
labelled() {
    printf 'SELINUX=enforcing\nSELINUXTYPE=default\n' >"$1/etc/selinux/config"
    chroot "$1" setfiles -F /etc/selinux/default/contexts/files/file_contexts / >&2
}

# The user, the well-known key and the network that Vagrant expects of a box.
as_box() {
    chroot "$1" useradd -m -s /bin/bash -u 1001 vagrant
    install -d -m700 "$1/home/vagrant/.ssh"
    cp "$here/guest/vagrant.pub" "$1/home/vagrant/.ssh/authorized_keys"
    chroot "$1" chown -R vagrant: /home/vagrant/.ssh
    printf 'vagrant ALL=(ALL) NOPASSWD: ALL\n' >"$1/etc/sudoers.d/vagrant"
    printf '[Match]\nName=e*\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n' >"$1/etc/systemd/network/80-dhcp.network"
}

if [ "$1" = --inside ]; then
    inside "$2" "$3"
    exit
fi
suite=$1 security=$2 out=$3 checkout=$4
work=$(mktemp -d "$(dirname -- "$out")/root.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
echo "  its packages, and the virtual environment of the suite"
# A mirror may stand still (snapshot.debian.org): what it has is signed all the same.
mmdebstrap --variant=apt --include="$base,$(packages_of "$security")" --skip=cleanup/reproducible \
    --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Check-Valid-Until "false"' --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --customize-hook="sh '$here/build-root.sh' --inside \"\$1\" '$checkout'" \
    "$suite" "$work/root" "${DEV_VM_MIRROR:-http://deb.debian.org/debian}"
echo "  the image"
truncate -s 5G "$out"
mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1,root_owner=0:0 -d "$work/root" "$out"
[ -z "${SUDO_UID:-}" ] || chown "$SUDO_UID" "$out"
