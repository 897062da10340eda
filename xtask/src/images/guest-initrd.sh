#!/bin/sh
# Loads drivers and goes to the root file system.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module" 2>/dev/null; done < /modules/order
tries=0
until disk=$($b findfs LABEL=root 2>/dev/null) && $b mount -t @ROOT@ "$disk" /new; do
    tries=$((tries + 1))
    [ $tries -gt 100 ] && { echo "GUEST-FAILED no root disk"; $b poweroff -f; }
    $b sleep 0.1
done
for dir in dev proc sys; do $b mount --move /$dir /new/$dir; done
exec $b switch_root /new /sbin/init
