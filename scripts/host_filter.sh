# shellcheck shell=bash
# Rules of the machine's own packet filter. They refuse new connections from the platform's network to any address of the
# machine and to ports that its containers publish. They are a second barrier behind the filter of each worker
# (worker/network.nft), which distinguishes renters from root. The rules last until the machine restarts; make up adds them
# again. Source this file after common.sh.

host_rules() {
    local bridge protocol
    bridge=$(bridge_of_platform)
    [ -n "$bridge" ] || return 0
    for protocol in tcp udp; do
        # Port 53 stays open, because the machine may answer the containers' DNS queries.
        echo "INPUT -i $bridge -p $protocol ! --dport 53 -m conntrack --ctstate NEW -j REJECT"
    done
    echo "DOCKER-USER -i $bridge -m conntrack --ctstate DNAT --ctdir ORIGINAL -j REJECT"
}

bridge_of_platform() {
    docker network inspect "${COMPOSE_PROJECT_NAME}_orion_net" --format \
        '{{with index .Options "com.docker.network.bridge.name"}}{{.}}{{else}}br-{{printf "%.12s" .Id}}{{end}}' 2>/dev/null
}

add_host_rules() {
    local rule
    while read -r rule; do
        # shellcheck disable=SC2086 # the rule is several words
        as_root_without_password iptables -w 5 -C $rule 2>/dev/null || as_root_without_password iptables -w 5 -I $rule || {
            echo "The machine's own packet filter could not be changed (as root: iptables -I $rule): only the workers' filters keep rentals from connecting to this machine"
            return 0
        }
    done < <(host_rules)
}

# Remove the rules. This must happen before the network is removed, because they contain the name of its bridge.
remove_host_rules() {
    local rule
    while read -r rule; do
        # shellcheck disable=SC2086 # the rule is several words
        as_root_without_password iptables -w 5 -D $rule 2>/dev/null || true
    done < <(host_rules)
}
