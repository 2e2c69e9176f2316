#!/bin/sh
# The start of a worker, as root: it sets the packet filter and makes the host keys, gives up for good NET_ADMIN and the
# capabilities that could regain it, and becomes the agent. Each failure ends the container with one clear line.
set -eu
# The kernel drops signals that process 1 has no handler for, and docker stop would wait for its whole grace.
trap 'exit 0' TERM INT

fail() {
    echo "orion-worker: $*" >&2
    exit 1
}

: "${ORION_SUBNET:=172.20.0.0/16}"
[ -n "${ORION_APP_ADDRESS:-}" ] || fail "ORION_APP_ADDRESS is not set: it is the manager's address on orion_net"

# Renters never reach orion_net as configured and as it really is, its gateway, the machine itself by the addresses that
# make up has found (ORION_HOST_ADDRESSES), and places that the operator names with an exclamation mark.
# Unless the operator opens them, renters do not reach local networks, where the machine's other containers and its
# neighbours are, and addresses that no host on the Internet has. (Clouds serve the host's credentials in
# 169.254.0.0/16.)
connected=$(ip -o -4 route show scope link | cut -d ' ' -f 1 | paste -s -d ,)
gateway=$(ip -o -4 route show default | cut -d ' ' -f 3 | paste -s -d ,)
# orion_net may have IPv6, which this worker does not use (network.nft): its neighbours there must stay closed too.
connected6=$(ip -o -6 route show proto kernel | cut -d ' ' -f 1 | grep : | paste -s -d ,)
local=0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,169.254.0.0/16,172.16.0.0/12,192.0.0.0/24,192.168.0.0/16
local=$local,198.18.0.0/15,224.0.0.0/4,240.0.0.0/4
local6=fc00::/7,fe80::/10,ff00::/8,64:ff9b::/96,64:ff9b:1::/48,2002::/16
is_place() {
    python3 -I -c 'import ipaddress, sys; ipaddress.ip_network(sys.argv[1])' "$1" 2>/dev/null
}
own=$ORION_SUBNET${connected:+,$connected}${gateway:+,$gateway} own6=::1${connected6:+,$connected6}
for address in $(echo "${ORION_HOST_ADDRESSES:-}" | tr ',' ' '); do
    is_place "$address" || fail "ORION_HOST_ADDRESSES: $address is no address such as 203.0.113.7"
    case $address in
    *:*) own6=$own6,$address ;;
    *) own=$own,$address ;;
    esac
done
opened='' opened6='' beyond=0.0.0.0/0 beyond6=::/0

# ORION_EGRESS: `internet` (the default), `none`, addresses and networks that are open, and those with an exclamation
# mark, which never are.
for place in $(echo "${ORION_EGRESS:-internet}" | tr ',' ' '); do
    case $place in
    internet)
        beyond=$local
        beyond6=$local6
        continue
        ;;
    none) continue ;;
    esac
    is_place "${place#!}" ||
        fail "ORION_EGRESS: $place is not internet, none, or an address or network such as 203.0.113.0/24 or !203.0.113.7"
    case $place in
    !*:*) own6=$own6,${place#!} ;;
    !*) own=$own,${place#!} ;;
    *:*) opened6=$opened6,$place ;;
    *) opened=$opened,$place ;;
    esac
done

# A set may not be empty: the first elements below are addresses that no host has.
nft --define "app=$ORION_APP_ADDRESS" \
    --define "proxy=${ORION_PROXY_ADDRESS:-$ORION_APP_ADDRESS}" \
    --define "own={ $own }" --define "own6={ $own6 }" \
    --define "opened={ 255.255.255.255$opened }" --define "opened6={ ::$opened6 }" \
    --define "beyond={ $beyond }" --define "beyond6={ $beyond6 }" \
    --file /etc/orion/network.nft \
    || fail "the packet filter could not be set (needs nf_tables in the kernel, and the capability NET_ADMIN): not starting without it"

# The key is renamed into place, so that an interrupted start leaves no half key.
if [ ! -s /etc/ssh/ssh_host_ed25519_key ]; then
    rm -rf /etc/ssh/new
    mkdir -m 0700 /etc/ssh/new
    ssh-keygen -q -t ed25519 -N '' -C '' -f /etc/ssh/new/key || fail "no host key could be made"
    mv /etc/ssh/new/key.pub /etc/ssh/ssh_host_ed25519_key.pub
    mv /etc/ssh/new/key /etc/ssh/ssh_host_ed25519_key
    rmdir /etc/ssh/new
fi

install -d -m 0755 /run/sshd
install -d -m 0700 /run/orion
printf '%s\n' "$ORION_APP_ADDRESS" > /etc/orion/app_address

if [ "$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)" -le 22 ]; then
    echo "orion-worker: warning: a renter could take port 22 while sshd is being started again; set the sysctl" \
        "net.ipv4.ip_unprivileged_port_start=1024 and add the capability NET_BIND_SERVICE" >&2
fi

# tini reaps the orphans of renters; -s makes it do so where another init is process 1. A SIGTERM that arrives before
# the agent can take it stays pending, because it is blocked here and the agent unblocks it.
exec env --block-signal=TERM,INT setpriv --inh-caps=-all --bounding-set=-net_admin,-net_raw,-setpcap -- \
    /usr/bin/tini -s -- /usr/local/lib/orion/orion-agent
