# shellcheck shell=bash
# The machine's own filter: from the platform's network nobody begins a connection to the machine, by whichever address, nor
# to ports that its containers publish. A second wall behind that of each worker (worker/network.nft), which knows a renter
# from root. It stands until the machine starts anew; make up sets it again. To be sourced after common.sh.

host_rules() {
    local bridge protocol
    bridge=$(bridge_of_platform)
    [ -n "$bridge" ] || return 0
    for protocol in tcp udp; do
        # The machine may be who answers the containers' questions for names.
        echo "INPUT -i $bridge -p $protocol ! --dport 53 -m conntrack --ctstate NEW -j REJECT"
    done
    echo "DOCKER-USER -i $bridge -m conntrack --ctstate DNAT --ctdir ORIGINAL -j REJECT"
}

bridge_of_platform() {
    docker network inspect "${COMPOSE_PROJECT_NAME}_orion_net" --format \
        '{{with index .Options "com.docker.network.bridge.name"}}{{.}}{{else}}br-{{printf "%.12s" .Id}}{{end}}' 2>/dev/null
}

close_host() {
    local rule
    while read -r rule; do
        # shellcheck disable=SC2086 # words
        as_root_unasked iptables -w 5 -C $rule 2>/dev/null || as_root_unasked iptables -w 5 -I $rule || {
            echo "The machine's own filter could not be set (as root: iptables -I $rule): the workers' filters alone keep rentals from this machine"
            return 0
        }
    done < <(host_rules)
}

# Before the network goes, and its bridge's name with it.
reopen_host() {
    local rule
    while read -r rule; do
        # shellcheck disable=SC2086 # words
        as_root_unasked iptables -w 5 -D $rule 2>/dev/null || true
    done < <(host_rules)
}
