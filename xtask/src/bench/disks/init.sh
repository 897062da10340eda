#!/bin/sh
# Does the jobs of /jobs, one line each, on the guest's disk, and tells how each went.
b=/bin/busybox
$b mount -t proc proc /proc
$b --install -s /bin
export PATH=/bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
while read -r module; do insmod "/modules/$module" 2>/dev/null; done < /modules/order
interrupts() {
    awk '/virtio/ {for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i} END {print n + 0}' /proc/interrupts
}
number=0
while read -r job; do
    before=$(interrupts)
    echo "LOAD-BEGIN-$number."
    outcome=$(blkbench "$job" 2>&1)
    echo "LOAD-END-$number. $(($(interrupts) - before)) $outcome"
    # Whoever reads the VMM's counters has to come first.
    sleep 0.2
    number=$((number + 1))
done < /jobs
echo LOAD-DONE
sleep 1000
