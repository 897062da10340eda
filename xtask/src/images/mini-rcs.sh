#!/bin/sh
# Everything between init and the shell.
export PATH=/bin:/sbin
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
hostname mini
ifconfig lo up
for device in /sys/class/net/e*; do
    [ -e "$device" ] || continue
    ifconfig "${device##*/}" up
    udhcpc -q -n -t 3 -T 1 -s /bin/udhcpc.sh -i "${device##*/}" >/dev/null 2>&1
done
boots=$(($(cat /root/boots 2>/dev/null || echo 0) + 1))
echo $boots > /root/boots
sync
firmware=bios
[ -d /sys/firmware/efi ] && firmware=uefi
echo "MINI-READY boots=$boots up=$(cut -d' ' -f1 /proc/uptime) kernel=$(uname -r)" \
    "cpus=$(nproc) mem=$(awk '/MemTotal/ {print $2}' /proc/meminfo) fw=$firmware" \
    "root=$(awk '$2 == "/" {print $1}' /proc/mounts | tail -1)" \
    "ip=$(ifconfig | awk '/inet addr/ && !/127/ {sub("addr:", "", $2); print $2}')" > /dev/console
grep -q mini.poweroff /proc/cmdline && poweroff -f
[ -x /root/autorun ] && /root/autorun > /dev/console 2>&1
