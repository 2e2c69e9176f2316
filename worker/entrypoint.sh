#!/bin/sh
# The start of a worker, as root: the packet filter, the host keys; then NET_ADMIN and what could regain it are given
# up for good, and the agent is the main process. Whatever fails here ends the container with one clear line.
set -eu
# The kernel keeps a signal from process 1 that has no handler for it: docker stop would wait for its whole grace.
trap 'exit 0' TERM INT

fail() {
    echo "orion-worker: $*" >&2
    exit 1
}

: "${ORION_SUBNET:=172.20.0.0/16}"
[ -n "${ORION_APP_ADDRESS:-}" ] || fail "ORION_APP_ADDRESS is not set: it is the manager's address on orion_net"

# What renters may not reach: orion_net as configured and as it really is, the gateway, and addresses that only have a
# meaning on the local network, where the machine itself, its other containers and its neighbours are. (169.254.0.0/16 is
# where clouds keep the host's credentials.)
connected=$(ip -o -4 route show scope link | cut -d ' ' -f 1 | paste -s -d ,)
gateway=$(ip -o -4 route show default | cut -d ' ' -f 3 | paste -s -d ,)
local=10.0.0.0/8,100.64.0.0/10,169.254.0.0/16,172.16.0.0/12,192.168.0.0/16
closed="$ORION_SUBNET,$local,224.0.0.0/4,255.255.255.255${connected:+,$connected}${gateway:+,$gateway}"

nft --define "app=$ORION_APP_ADDRESS" \
    --define "proxy=${ORION_PROXY_ADDRESS:-$ORION_APP_ADDRESS}" \
    --define "closed={ $closed }" \
    --file /etc/orion/network.nft \
    || fail "the packet filter could not be set (needs nf_tables in the kernel, and the capability NET_ADMIN): not starting without it"

# In one step, so that a start which was cut short leaves no half key.
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

# tini reaps what renters orphan; -s makes it do so where another init is process 1. What comes before the agent can take
# SIGTERM is kept for it: the agent unblocks it.
exec env --block-signal=TERM,INT setpriv --inh-caps=-all --bounding-set=-net_admin,-net_raw,-setpcap -- \
    /usr/bin/tini -s -- /usr/local/lib/orion/agent.py
