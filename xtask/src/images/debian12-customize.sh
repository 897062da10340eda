#!/bin/sh
# Runs inside the new system: what an installer would have asked or done.
set -eu
echo legacy12 > /etc/hostname
cat > /etc/fstab <<'FSTAB'
LABEL=root / ext4 errors=remount-ro 0 1
LABEL=ESP /boot/efi vfat umask=0077,nofail 0 1
FSTAB
mkdir -p /boot/efi /boot/grub /usr/lib/edgevmm-image
echo root:root | chpasswd
systemctl enable -q ssh qemu-guest-agent systemd-networkd systemd-resolved serial-getty@ttyS0 2>/dev/null
: > /etc/machine-id

mkdir -p /etc/ssh/sshd_config.d /etc/systemd/network /etc/cloud/cloud.cfg.d
echo 'PermitRootLogin yes' > /etc/ssh/sshd_config.d/test.conf
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' > /etc/systemd/network/80-dhcp.network
cat > /etc/cloud/cloud.cfg.d/90_test.cfg <<'CLOUD'
datasource_list: [ NoCloud, ConfigDrive, None ]
ssh_pwauth: true
disable_root: false
CLOUD

cat > /etc/systemd/system/d12-ready.service <<'UNIT'
[Unit]
Description=Tell the tests that the system is up
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/d12-ready
[Install]
WantedBy=graphical.target
UNIT
cat > /usr/local/sbin/d12-ready <<'READY'
#!/bin/sh
firmware=bios
[ -d /sys/firmware/efi ] && firmware=uefi
echo "D12-READY up=$(cut -d' ' -f1 /proc/uptime) kernel=$(uname -r) cpus=$(nproc)" \
    "fw=$firmware ip=$(hostname -I) state=$(systemctl is-system-running)" > /dev/ttyS0
READY
chmod 755 /usr/local/sbin/d12-ready
systemctl enable -q d12-ready

release=$(basename "$(readlink -f /boot/vmlinuz-* | sort -V | tail -1)")
release=${release#vmlinuz-}
cat > /boot/grub/grub.cfg <<CONFIG
insmod serial
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout=1
menuentry "Debian GNU/Linux" {
    linux /boot/vmlinuz-$release root=LABEL=root ro console=tty0 console=ttyS0,115200 net.ifnames=0
    initrd /boot/initrd.img-$release
}
CONFIG

# GRUB as its installer would leave it, except for what needs the disk.
cat > /tmp/early.cfg <<'EARLY'
search --no-floppy --label root --set=root
set prefix=($root)/boot/grub
configfile ($root)/boot/grub/grub.cfg
EARLY
modules="part_msdos part_gpt ext2 fat search search_label configfile normal linux echo serial terminal test"
for target in i386-pc x86_64-efi; do
    mkdir -p /boot/grub/$target
    cp /usr/lib/grub/$target/*.mod /usr/lib/grub/$target/*.lst /boot/grub/$target/
done
grub-mkimage -O i386-pc -o /usr/lib/edgevmm-image/core.img -p /boot/grub -c /tmp/early.cfg \
    biosdisk $modules
grub-mkimage -O x86_64-efi -o /usr/lib/edgevmm-image/bootx64.efi -p /boot/grub -c /tmp/early.cfg \
    $modules
rm -f /tmp/early.cfg
rm -rf /var/lib/apt/lists/* /var/cache/apt/*
