#!/bin/sh
# The first program of a guest, in its initrd.
#
#   modules ─> /dev/vda mounted ─> the agent put into /run ─┬─ the image has an init ─> both, side by side
#                                                           └─ it has none ──────────> the agent alone
#
# Kernel command line:
#   root=/dev/vda         mount it (Firecracker adds this for the root drive, and ro or rw);
#                         without it everything happens in the initrd
#   rekindle.layer=D      the root is only read, and joined with what is written to the file system on D:
#                         /dev/vda, ro ─┐
#                         D ────────────┴─ overlayfs ─> /      (both also are in /run/rekindle)
#   init=PATH             the image's init, else /sbin/init
#   rekindle.init=agent   the agent alone, also where the image has an init
#   ip=ADDRESS::GATEWAY:NETMASK::DEVICE:off:DNS:DNS   IPv4, in the kernel's own words
#   rekindle.ip6=DEVICE,ADDRESS/LENGTH,GATEWAY        IPv6
#
# With reboot=k, going down ends Firecracker with status 0.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
set -f

finish() {
    # Setting the terminal waits until it has sent what it holds.
    stty sane
    sync
    # No word from the kernel about going down.
    echo 0 >/proc/sys/kernel/printk
    reboot -f
}

fail() {
    echo "rekindle: $1"
    finish
}

# Where the root is mounted read-only, and where the image's init looks: a tmpfs that it leaves alone.
put_agent() {
    mkdir -p "$1/run" 2>/dev/null
    [ -d "$1/run" ] || fail "the image has no /run, and nothing can be made in it"
    mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs "$1/run"
    mkdir "$1/run/rekindle"
    cp /bin/rekindle-agent "$1/run/rekindle/agent"
}

# The drivers find their devices while they are loaded; two seconds are for slow hosts.
await() {
    tries=0
    while [ ! -b "$1" ]; do
        [ $tries -lt 40 ] || fail "there is no block device $1"
        tries=$((tries + 1))
        usleep 50000
    done
}

# The root joined with what the guest writes, on /root. The layer is never on another image, so it may point into it.
join_root() {
    await "$layer"
    mkdir -p /image /layer
    mount -o ro "$root" /image || fail "cannot mount $root read-only; if it needs a repair, e2fsck -p makes it"
    # What the layer is copied from has no inode tables yet, so that it is small: it stays so.
    mount -t ext4 -o noinit_itable "$layer" /layer || fail "cannot mount the layer $layer"
    mkdir -p /layer/upper /layer/work
    mount -t overlay -o redirect_dir=on,lowerdir=/image,upperdir=/layer/upper,workdir=/layer/work overlay /root ||
        fail "cannot join $root and $layer"
    mkdir -p /root/proc /root/sys /root/dev /root/run /root/tmp
}

# Where a guest that wants to can see them, and freeze the layer.
show_parts() {
    for part in image layer; do
        mkdir /root/run/rekindle/$part
        mount --move /$part /root/run/rekindle/$part
    done
}

# The address is there at once: nobody else can have it.
configure_v4() {
    IFS=:
    set -- $1
    unset IFS
    # address server gateway netmask host device auto dns dns
    ifconfig "$6" "$1" netmask "$4" up
    [ -z "$3" ] || ip route add default via "$3" dev "$6"
    for server in "$8" "$9"; do
        [ -z "$server" ] || resolvers="${resolvers}nameserver $server
"
    done
}

configure_v6() {
    IFS=,
    set -- $1
    unset IFS
    echo 0 >"/proc/sys/net/ipv6/conf/$1/accept_dad"
    ip link set "$1" up
    ip -6 addr add "$2" dev "$1"
    [ -z "$3" ] || ip -6 route add default via "$3" dev "$1"
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

resolvers= root= layer= mode=ro first=image init=/sbin/init
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    rekindle.layer=*) layer=${word#rekindle.layer=} ;;
    ro | rw) mode=$word ;;
    rekindle.init=*) first=${word#rekindle.init=} ;;
    init=*) init=${word#init=} ;;
    ip=*:*) configure_v4 "${word#ip=}" ;;
    rekindle.ip6=*) configure_v6 "${word#rekindle.ip6=}" ;;
    esac
done

if [ -n "$root" ]; then
    await "$root"
    if [ -n "$layer" ]; then
        join_root
    else
        mount -o "$mode" "$root" /root || fail "cannot mount $root $mode"
    fi
    for directory in proc sys dev; do
        if [ -d /root/$directory ]; then
            mount --rbind /$directory /root/$directory
        fi
    done
    if [ -n "$resolvers" ] && { [ -n "$layer" ] || [ "$mode" = rw ]; } && [ ! -s /root/etc/resolv.conf ]; then
        mkdir -p /root/etc
        printf %s "$resolvers" >/root/etc/resolv.conf
    fi
    if [ -z "$layer" ] && [ "$mode" = ro ]; then
        [ ! -d /root/tmp ] || mount -t tmpfs -o nosuid,nodev tmpfs /root/tmp
    fi
    put_agent /root
    [ -z "$layer" ] || show_parts
    if [ "$first" = agent ] || ! { [ -x "/root$init" ] || [ -L "/root$init" ]; }; then
        exec switch_root /root /run/rekindle/agent --init
    fi
    setsid chroot /root /run/rekindle/agent </dev/null &
    exec switch_root /root "$init"
fi

put_agent ""
[ "$first" != agent ] || exec /run/rekindle/agent --init
setsid /run/rekindle/agent </dev/null &
setsid cttyhack sh
finish
