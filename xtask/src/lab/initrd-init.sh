#!/bin/sh
# First program of L1: finds the root disk, lays a writable layer in RAM over it, goes there.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module"; done < /modules/order
$b mount -t tmpfs -o size=90% layers /mnt
$b mkdir /mnt/lower /mnt/upper /mnt/work
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -gt 500 ] && { echo "lab: no root disk"; exit 1; }
    $b sleep 0.02
done
$b mount -t squashfs -o ro /dev/vda /mnt/lower
$b mount -t overlay -o lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work root /new
$b umount /proc
$b umount /sys
$b mount --move /dev /new/dev
exec $b switch_root /new /usr/local/sbin/edgevmm-lab agent init
