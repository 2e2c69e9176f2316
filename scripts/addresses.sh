# shellcheck shell=bash
# Derive the addresses from the subnet, and check subnet and ports before anything is started. Source it after common.sh.

to_number() {
    local a b c d
    IFS=. read -r a b c d <<<"$1"
    echo $(((a << 24) + (b << 16) + (c << 8) + d))
}

to_address() { echo "$(($1 >> 24 & 255)).$(($1 >> 16 & 255)).$(($1 >> 8 & 255)).$(($1 & 255))"; }

mask_of() { echo $(((0xFFFFFFFF << (32 - $1)) & 0xFFFFFFFF)); }

# Set the fixed addresses to the first ones of the subnet, and the workers' range to its upper half.
derive_addresses() {
    [[ $ORION_SUBNET =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2}$ ]] ||
        fail "ORION_SUBNET=$ORION_SUBNET is not a subnet: write it like 10.77.0.0/16"
    local base prefix=${ORION_SUBNET#*/}
    base=$(to_number "${ORION_SUBNET%/*}")
    ((prefix >= 8 && prefix <= 28)) || fail "ORION_SUBNET=$ORION_SUBNET: the part after the / must be 8 to 28"
    (((base & $(mask_of "$prefix")) == base)) ||
        fail "ORION_SUBNET=$ORION_SUBNET is an address inside a subnet: write $(to_address $((base & $(mask_of "$prefix"))))/$prefix"
    export ORION_GATEWAY=${ORION_GATEWAY:-$(to_address $((base + 1)))}
    export ORION_PROXY_ADDRESS=${ORION_PROXY_ADDRESS:-$(to_address $((base + 2)))}
    export ORION_APP_ADDRESS=${ORION_APP_ADDRESS:-$(to_address $((base + 3)))}
    export ORION_WORKER_RANGE=${ORION_WORKER_RANGE:-$(to_address $((base + (1 << (31 - prefix)))))/$((prefix + 1))}
}

# Print the machine's own IPv4 addresses, sorted, to which rentals have no access. The addresses of Docker's bridges are
# left out, because they come and go. (orion_net has no IPv6.)
host_addresses() {
    local address subnet found=()
    for address in $(hostname -I 2>/dev/null); do
        [[ $address == *.*.*.* ]] || continue
        for subnet in $(docker_networks | tr ' ' '\n' | grep -F . | grep -F /); do
            ! overlap "$address/32" "$subnet" || continue 2
        done
        found+=("$address")
    done
    [ ${#found[@]} -eq 0 ] || printf '%s\n' "${found[@]}" | sort -u | paste -s -d ,
}

overlap() {
    local wider=$((${1#*/} < ${2#*/} ? ${1#*/} : ${2#*/})) mask
    mask=$(mask_of "$wider")
    ((($(to_number "${1%/*}") & mask) == ($(to_number "${2%/*}") & mask)))
}

docker_networks() {
    local all
    mapfile -t all < <(docker network ls --quiet)
    docker network inspect --format '{{.Name}}{{range .IPAM.Config}} {{.Subnet}}{{end}}' "${all[@]}"
}

# Print the routes of this machine, one "interface a.b.c.d/n" per line, without the bridges of existing Docker networks.
host_routes() {
    local interface destination mask rest bits bridges
    bridges=" docker0 $(docker network ls --format 'br-{{.ID}}' | tr '\n' ' ')"
    while read -r interface destination _ _ _ _ _ mask rest; do
        [[ $interface != Iface && $bridges != *" $interface "* ]] || continue
        [ "$mask" != 00000000 ] || continue
        bits=$(prefix_of_mask "$mask")
        echo "$interface $((16#${destination:6:2})).$((16#${destination:4:2})).$((16#${destination:2:2})).$((16#${destination:0:2}))/$bits"
    done </proc/net/route
}

prefix_of_mask() {
    local value=$((16#$1)) bits=0
    while ((value)); do
        bits=$((bits + (value & 1))) value=$((value >> 1))
    done
    echo "$bits"
}

check_subnet() {
    local subnet=${ORION_SUBNET:-172.20.0.0/16} own="${COMPOSE_PROJECT_NAME}_orion_net" name taken
    while read -r name taken; do
        taken=$(tr ' ' '\n' <<<"$taken" | grep -F . | head -n 1 || true) # at most one is an IPv4 subnet
        [ -n "$taken" ] || continue
        if [ "$name" = "$own" ]; then
            [ "$taken" = "$subnet" ] && return
            fail "the platform's network is $taken, not $subnet: make clean first, or ORION_SUBNET=$taken make up"
        fi
        overlap "$taken" "$subnet" && refuse_subnet "$subnet" "the Docker network $name ($taken)"
    done < <(docker_networks)
    while read -r name taken; do
        overlap "$taken" "$subnet" || continue
        [[ ! $name =~ ^br-[0-9a-f]{12}$ ]] || refuse_leftover_bridge "$subnet" "$name" "ip link delete $name; "
        refuse_subnet "$subnet" "a route of this machine ($taken on $name)"
    done < <(host_routes)
    while read -r name taken; do
        ! overlap "$taken" "$subnet" || refuse_leftover_bridge "$subnet" "$name"
    done < <(rules_without_network)
    return 0
}

# Print Docker's masquerading rules whose network does not exist any more, one "bridge a.b.c.d/n" per line. Such a rule
# would replace the proxy's address by the machine's, and the manager would refuse every call. Only root can read the rules.
rules_without_network() {
    local bridges rule=' -s ([0-9./]+) ! -o (br-[0-9a-f]{12}) -j MASQUERADE$' line
    bridges=" $(docker network ls --format 'br-{{.ID}}' | tr '\n' ' ')"
    while read -r line; do
        [[ $line =~ $rule && $bridges != *" ${BASH_REMATCH[2]} "* ]] || continue
        echo "${BASH_REMATCH[2]} ${BASH_REMATCH[1]}"
    done < <(as_root_without_password iptables-save -t nat 2>/dev/null)
}

# refuse_leftover_bridge SUBNET BRIDGE [COMMAND]
refuse_leftover_bridge() {
    fail "subnet $1 is used by a bridge or firewall rules that a former Docker engine left: restart the machine, or run
  as root: ${3:-}iptables-save | grep -v $2 | iptables-restore; then run make up"
}

refuse_subnet() {
    fail "subnet $1 is used by $2: choose another one, such as ORION_SUBNET=10.77.0.0/16 make up"
}

is_port_used() {
    local port
    port=$(printf '%04X' "$1")
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v port=":$port" '$4 == "0A" && $2 ~ port "$" { found = 1 } END { exit !found }'
}

# check_port VARIABLE DEFAULT: fail if the port is invalid, or used by another program than this platform's proxy.
check_port() {
    local port=${!1:-$2} container
    [[ $port =~ ^[0-9]{1,5}$ && $port -ge 1 && $port -le 65535 ]] || fail "$1=$port is not a port"
    [ -z "$(containers_of "$COMPOSE_PROJECT_NAME" manager_proxy --filter "publish=$port" --filter status=running)" ] || return 0
    is_port_used "$port" || return 0
    container=$(docker ps --filter "publish=$port" --format '{{.Names}}' | head -n 1)
    fail "port $port is used by ${container:+the container }${container:-another program}: free it, or choose another one, such as $1=$((port + 1000)) make up"
}
