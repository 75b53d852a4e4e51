# Before the packages of a host are installed: no initrd is made, the bake has its own.
set -eu
mkdir -p /etc/initramfs-tools
echo 'update_initramfs=no' >/etc/initramfs-tools/update-initramfs.conf
