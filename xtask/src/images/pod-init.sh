#!/bin/sh
# A guest of pods: asks for its address, obeys the power button, and runs the script `run` of the
# volume `config`, or serves its address as a page.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
while read -r module; do insmod "/modules/$module" 2>/dev/null; done < /modules/order
mkdir -p /www /cfg
for events in /dev/input/event*; do
    { head -c 24 "$events" > /dev/null && echo POWER-BUTTON > /dev/console && poweroff -f; } &
done
ifconfig lo up
for device in /sys/class/net/e*; do
    [ -e "$device" ] || continue
    ifconfig "${device##*/}" up
    udhcpc -q -n -t 5 -T 1 -s /bin/udhcpc.sh -i "${device##*/}" >/dev/null 2>&1
done
ip=$(ifconfig | awk '/inet addr/ && !/127/ {sub("addr:", "", $2); print $2}')
disks=$(for disk in /sys/block/vd*; do [ -e "$disk" ] && echo "${disk##*/}=$(cat "$disk/serial")"; done)
echo "GUEST-READY ip=$ip cpus=$(nproc) disks=$(echo $disks | tr ' ' ,)"
config=$(grep -lx config /sys/block/*/serial | cut -d / -f 4)
[ -n "$config" ] && mount -t iso9660 -o ro "/dev/$config" /cfg
if [ -f /cfg/run ]; then
    ip=$ip sh /cfg/run
else
    echo "$ip" > /www/index.html
    httpd -p 80 -h /www
fi
while :; do sleep 3600; done
