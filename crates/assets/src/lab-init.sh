#!/bin/sh
# The first program of the lab: a Linux with a working /dev/kvm inside QEMU's emulation.
#
#   host's / (9p, read-only) + tmpfs ─ overlay ─> /new      what is written goes away
#   share    (9p, read-write) ──────────────────> /new/…    the same path as outside
#
# Kernel command line:
#   rekindle.share=PATH   where the share is on the host, base64url
#   rekindle.run=NAME     a directory in the share: `command` is the shell script to run, `status`
#                         is written when it is done, `pulse` every few seconds until then
#   rekindle.tty=yes      somebody sits at the terminal
#
# Everything before the line "rekindle-lab: ready" is boot noise. The script's root lacks nothing
# of this one but the modules; the kernel asks this root's modprobe for them when it needs more.

export PATH=/bin:/sbin HOME=/root
set -f

fail() {
    echo "rekindle-lab: $1"
    stty sane
    poweroff -f
}

mkdir -p /proc /sys /dev /host /over /new
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
dmesg -n 1
modprobe -a $(cat /etc/modules)

share= run= tty=
for word in $(cat /proc/cmdline); do
    case $word in
    rekindle.share=*)
        share=$(printf %s "${word#rekindle.share=}" | tr -- '-_' '+/' | base64 -d)
        ;;
    rekindle.run=*) run=${word#rekindle.run=} ;;
    rekindle.tty=*) tty=${word#rekindle.tty=} ;;
    esac
done

p9=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $p9,ro,cache=loose host /host || fail "cannot mount the host's root"
mount -t tmpfs -o size=75% tmpfs /over
mkdir /over/up /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/up,workdir=/over/work overlay /new ||
    fail "cannot lay a tmpfs over the host's root"

mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp "/new$share"
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount -t devtmpfs devtmpfs /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o gid=5,mode=0620,ptmxmode=0666 devpts /new/dev/pts
mount -t tmpfs tmpfs /new/dev/shm
ln -s /proc/self/fd /new/dev/fd
for name in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${name%:*}" "/new/dev/${name#*:}"
done
mount -t tmpfs tmpfs /new/run
mount -t 9p -o $p9,rw,cache=none share "/new$share" || fail "cannot mount the share"
hostname lab
ip link set lo up
[ -c /new/dev/kvm ] || fail "there is no /dev/kvm in here"

(
    # The last to be killed for want of memory: whoever waits outside would take the lab for dead.
    echo -1000 >/proc/self/oom_score_adj
    while :; do
        echo >"/new$share/$run/pulse"
        sleep 5
    done
) </dev/null &

echo "rekindle-lab: ready"
if [ -n "$tty" ]; then
    setsid cttyhack chroot /new /bin/sh "$share/$run/command"
    status=$?
else
    stty raw -echo
    chroot /new /bin/sh "$share/$run/command" </dev/null
    status=$?
fi
echo $status >"/new$share/$run/status"
stty sane
sync
# What the command printed last stays the last: no word from the kernel about going down.
echo 0 >/proc/sys/kernel/printk
poweroff -f
