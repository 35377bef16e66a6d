#!/usr/bin/busybox sh
# First process of a guest (tests/kernel/guests.py): /guest/settings and /guest/job come in, what the job prints goes
# out by $CHANNEL as it comes, then a line "$MARK <exit code>", then a tar of what the job left in /out.
#
# Neither tracefs nor bpffs is mounted: as on a fresh host.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

/usr/bin/busybox --install -s /usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /mnt /out
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
. /guest/settings
hostname guest
ip link set lo up
for module in /guest/modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done

exec 3>"$CHANNEL"
stty -F "$CHANNEL" raw -echo
sh /guest/job >&3 2>&3 </dev/null
printf '\n%s %d\n' "$MARK" $? >&3
tar -C /out -cf - . >&3
exec 3>&- # waits until all of it has left
poweroff -f
