#!/bin/sh
# build-kernel.sh SUITE OUT: Debian's cloud kernel of a suite into OUT: vmlinuz, a small initrd, its modules as an ext4 image, and its release.
# apt works in a state of its own: nothing is installed here, and no root is needed.
set -eu
suite=$1 out=$2
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
mirror=${DEV_VM_MIRROR:-http://deb.debian.org/debian}
work=$(mktemp -d "$out/kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/tree" "$work/initrd/bin" "$work/initrd/modules"
for source in "$suite" "${suite%-backports}"; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $source main"
done | sort -u >"$work/sources.list"
cat >"$work/apt.conf" <<APT
Dir::Etc::sourcelist "$work/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$work/lists"; Dir::State::status "/dev/null"; Dir::Cache "$work/cache";
Acquire::Check-Valid-Until "false"; APT::Default-Release "$suite"; APT::Sandbox::User "root"; Acquire::Languages "none"; APT::Architecture "amd64";
APT
export APT_CONFIG="$work/apt.conf"
apt-get -qq update

depends() { apt-cache depends "$1" | sed -n "s/^ *Depends: \\($2\\)/\\1/p"; }
package=$(depends linux-image-cloud-amd64 'linux-image-[0-9].*')
# shellcheck disable=SC2046 # newer kernels come in two packages
(cd "$work" && apt-get -qq download "$package" $(depends "$package" 'linux-\(modules\|binary\)-.*') busybox-static)
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/tree"; done
find_one() { find "$work/tree" -path "$1" | head -n 1; }

modules=$(find_one '*/lib/modules/*/kernel')
modules=${modules%/kernel}
release=$(basename "$modules")
mkdir -p "$work/disk/lib/modules"
mv "$modules" "$work/disk/lib/modules/"
depmod -b "$work/disk" "$release"
cp "$(find_one "*/vmlinuz*")" "$out/vmlinuz" 2>/dev/null || cp "$work/disk/lib/modules/$release/vmlinuz" "$out/vmlinuz"

initrd=$work/initrd
mkdir "$initrd/proc" "$initrd/dev" "$initrd/root"
cp "$(find_one '*/bin/busybox')" "$initrd/bin/busybox"
install -m755 "$here/guest/init" "$initrd/init"
needed="virtio_pci virtio_blk virtio_console virtio_net ext4"
for module in $needed; do modprobe -d "$work/disk" -S "$release" --show-depends "$module"; done >"$work/loads" # insmod FILE, or builtin NAME
sed -n 's/^insmod //p' "$work/loads" >"$work/files"
while read -r file; do
    name=$(basename "$file" | sed 's/\.ko.*/.ko/')
    [ ! -e "$initrd/modules/$name" ] || continue
    case $file in *.xz) xz -dc "$file" ;; *.zst) zstd -dc "$file" ;; *) cat "$file" ;; esac >"$initrd/modules/$name"
    echo "$name" >>"$initrd/modules/order"
done <"$work/files"
# No pipe, whose beginning may fail unseen. What was packed is read again: a machine that finds no disk could not say why.
(cd "$initrd" && find . >"$work/names" && cpio -o -H newc -R 0:0 --quiet <"$work/names" >"$work/initrd.cpio")
gzip -1 <"$work/initrd.cpio" >"$out/initrd"
gzip -dc <"$out/initrd" >"$work/again"
cpio -it --quiet <"$work/again" >"$work/packed"
for file in init bin/busybox; do grep -qxF "$file" "$work/packed" || { echo "the initrd has no $file" >&2; exit 1; }; done
for module in $needed; do
    grep -qx -e "builtin $module" -e "modules/$module\.ko" "$work/loads" "$work/packed" || { echo "the initrd has no $module" >&2; exit 1; }
done

size=$(du -sk "$work/disk/lib/modules" | cut -f1)
truncate -s "$((size * 12 / 10 + 16384))K" "$out/modules.img"
mke2fs -q -t ext4 -O ^has_journal -E root_owner=0:0 -d "$work/disk/lib/modules" "$out/modules.img"
echo "$release" >"$out/release"
