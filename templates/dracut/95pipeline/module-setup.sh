#!/bin/bash
# A dracut module that mounts a pipeline root. dracut and udev load the drivers; everything from "find the slot"
# to the credentials is done by the static program, the same as in the initrd without dracut.

# Only when asked for with --modules or --add.
check() {
    return 255
}

depends() {
    echo base udev-rules
}

installkernel() {
    # The list of the other initrd, and beyond it the drivers of all disks, which is what dracut is chosen for.
    hostonly='' instmods $(sed 's/#.*//' "$moddir/modules.txt")
    hostonly='' instmods "=drivers/ata" "=drivers/nvme" "=drivers/block" "=drivers/scsi" "=drivers/mmc" \
        "=drivers/usb/host" "=drivers/usb/storage" "=drivers/virtio" "=drivers/message/fusion"
}

install() {
    inst_simple /usr/lib/pipeline/init
    inst_hook cmdline 95 "$moddir/pipeline-cmdline.sh"
    inst_hook mount 50 "$moddir/pipeline-mount.sh"
}
