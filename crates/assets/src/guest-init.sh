#!/bin/sh
# The first program of a guest, in its initrd.
#
#   modules ─> /dev/vda mounted ─┬─ rekindle.cmd=… ─> run, print the status, power off
#                                └─ otherwise ──────> the image's own init
#
# Kernel command line:
#   root=/dev/vda     mount it (Firecracker adds this for the root drive, and ro or rw);
#                     without it everything happens in the initrd
#   rekindle.cmd=X    X is a shell line in base64url
#   init=PATH         the image's init, else /sbin/init
#
# A command's status is printed as "rekindle: exit N" on a line of its own, after one line break
# that is not the command's. With reboot=k, powering off ends Firecracker with status 0.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
set -f

finish() {
    printf '\nrekindle: exit %s\n' "$1"
    # Setting the terminal waits until it has sent what it holds.
    stty sane
    sync
    # That line is the last one: no word from the kernel about going down.
    echo 0 >/proc/sys/kernel/printk
    reboot -f
}

fail() {
    echo "rekindle: $1"
    finish 125
}

mkdir -p /proc /sys /dev /root /run /tmp
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o nosuid,noexec,gid=5,mode=0620 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
for name in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${name%:*}" "/dev/${name#*:}"
done

modprobe -a $(cat /etc/modules)
ip link set lo up

root= mode=ro command= has_command= init=/sbin/init
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    ro | rw) mode=$word ;;
    rekindle.cmd=*)
        has_command=yes
        command=$(printf %s "${word#rekindle.cmd=}" | tr -- '-_' '+/' | base64 -d)
        [ -n "$command" ] || fail "rekindle.cmd is no base64"
        ;;
    init=*) init=${word#init=} ;;
    esac
done

if [ -n "$root" ]; then
    # The drivers find their devices while they are loaded; two seconds are for slow hosts.
    tries=0
    while [ ! -b "$root" ]; do
        [ $tries -lt 40 ] || fail "there is no block device $root"
        tries=$((tries + 1))
        usleep 50000
    done
    mount -o "$mode" "$root" /root || fail "cannot mount $root $mode"
    for directory in proc sys dev; do
        if [ -d /root/$directory ]; then
            mount --rbind /$directory /root/$directory
        fi
    done
    if [ "$mode" = ro ]; then
        for directory in run tmp; do
            [ ! -d /root/$directory ] || mount -t tmpfs -o nosuid,nodev tmpfs /root/$directory
        done
    fi
    if [ -z "$has_command" ]; then
        [ -x "/root$init" ] || [ -L "/root$init" ] || fail "the image has no $init"
        exec switch_root /root "$init"
    fi
    chroot /root /bin/sh -c "$command"
    finish $?
fi

if [ -n "$has_command" ]; then
    sh -c "$command"
    finish $?
fi
setsid cttyhack sh
finish $?
