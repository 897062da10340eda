#!/bin/sh
# What busybox's DHCP client calls with what it learnt.
case $1 in
bound | renew)
    ifconfig "$interface" "$ip" netmask "$subnet"
    [ -n "$router" ] && route add default gw "${router%% *}"
    echo "nameserver ${dns%% *}" > /etc/resolv.conf
    ;;
esac
