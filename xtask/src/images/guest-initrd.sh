#!/bin/sh
# Loads drivers and goes to the root file system.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module" 2>/dev/null; done < /modules/order
# Not by its label, which not all of these shells can look for. The root is the last partition.
find_root() {
    for disk in /dev/[vs]da3 /dev/[vs]da2; do $b mount -t @ROOT@ "$disk" /new 2>/dev/null && return; done
    return 1
}
tries=0
until find_root; do
    tries=$((tries + 1))
    [ $tries -gt 100 ] && { echo "GUEST-FAILED no root disk"; $b poweroff -f; }
    $b sleep 0.1
done
for dir in dev proc sys; do $b mount --move /$dir /new/$dir; done
exec $b switch_root /new /sbin/init
