#!/bin/sh
# Wait for the proxy secret, make a certificate if there is none, run Nginx, and reload Nginx when the certificate changes.
set -eu
umask 077

secret=/run/orion-proxy/secret
tls=/etc/orion-tls
# KiB of memory that Nginx needs without any connection: Nginx itself with two old workers that finish their connections
# after a reload (80 MiB), the full zones of limits.conf and of TLS (81 MiB), and /tmp and /run (17 MiB).
kib_base=$((178 * 1024))
# KiB of memory that one connection may need: manager_proxy/limits.conf explains the sum.
kib_per_connection=140
# Nginx serves a renewed certificate within `check_every_s` seconds, and a second one at the earliest `reload_every_s`
# seconds later: each reload may leave two old workers that finish their connections (worker_shutdown_timeout), and the
# number of processes is limited.
check_every_s=10
reload_every_s=1800
# Seconds after which a stop cuts open connections; Nginx itself would wait for worker_shutdown_timeout.
drain_s=3

wait_for_secret() {
    waited=0
    while ! [ -s "$secret" ]; do
        if [ $((waited % 30)) -eq 0 ]; then
            echo "waiting for $secret, which manager_app creates at its first start (${waited} s so far)"
        fi
        sleep 1
        waited=$((waited + 1))
    done
}

# Write the proxy secret for Nginx. The file is on a tmpfs and only root can read it, so neither the image nor the workers
# of Nginx have the secret in a file.
write_secret() {
    value=$(cat "$secret")
    case $value in
    *[!A-Za-z0-9._-]*)
        echo "$secret contains characters that a secret of Orion-Sec never has: run make clean, then make up" >&2
        exit 1
        ;;
    esac
    printf 'proxy_set_header X-Orion-Proxy-Secret %s;\n' "$value" >/run/orion-secret.conf
}

# Write the host names of web ports: PORT-RENTAL under localhost, which browsers resolve to their own machine, and under
# ORION_APPS_DOMAIN.
write_web_hosts() {
    domains='localhost'
    if [ -n "${ORION_APPS_DOMAIN:-}" ]; then
        case $ORION_APPS_DOMAIN in
        *[!a-z0-9.-]* | .* | *. | -*)
            echo "ORION_APPS_DOMAIN must be a domain in lower-case letters, such as apps.example.org" >&2
            exit 1
            ;;
        esac
        domains="$domains|$(echo "$ORION_APPS_DOMAIN" | sed 's/\./\\./g')"
    fi
    printf 'server_name "~^(?<web_port>[1-9][0-9]{3,4})-(?<web_rental>[a-z2-7]{10})\\.(?:%s)$";\n' "$domains" \
        >/run/orion-web-hosts.conf
}

# Write the outer proxies whose X-Forwarded-* headers Nginx accepts: the addresses and networks of ORION_TRUSTED_PROXIES,
# separated by commas. By default there are none.
write_trusted_proxies() {
    : >/run/orion-trusted.conf
    trusted=$(echo "${ORION_TRUSTED_PROXIES:-}" | tr ',' ' ')
    for network in $trusted; do
        case $network in
        *[!0-9a-fA-F.:/]* | */*/* | */0 | */00 | */)
            echo "ORION_TRUSTED_PROXIES: $network is not an address or a network such as 192.0.2.7 or 10.1.0.0/24" >&2
            exit 1
            ;;
        esac
        echo "set_real_ip_from $network;" >>/run/orion-trusted.conf
    done
    # shellcheck disable=SC2016 # a variable of Nginx
    {
        echo 'geo $realip_remote_addr $by_trusted_proxy {'
        echo '    default 0;'
        for network in $trusted; do echo "    $network 1;"; done
        echo '}'
    } >>/run/orion-trusted.conf
}

# Compute the limits from the memory: `connections` fit even if each needs the most that one can, connections to the
# manager and to workers included. At most half of them carry a request at a time (`requests`). One visitor may have a
# quarter as many connections and a fifth of the requests, all visitors together seven eighths (`visitors`): the rest is
# reserved for the workers.
compute_limits() {
    kib=$(memory_limit_kib)
    connections=$(((kib - kib_base) / kib_per_connection))
    # Each connection is an open file of one of the two workers of Nginx, which have some other files open as well.
    # shellcheck disable=SC3045 # Debian's sh has this option
    files=$(ulimit -n)
    if [ "$files" != unlimited ] && [ "$connections" -gt $((2 * (files - 100))) ]; then
        connections=$((2 * (files - 100)))
    fi
    requests=$((connections / 2))
    visitors=$((requests * 7 / 8))
    if [ "$requests" -lt 256 ]; then
        echo "ORION_PROXY_MEMORY is too small: $((kib / 1024))m, and manager_proxy needs $(((kib_base + 512 * kib_per_connection) / 1024 + 1))m or more" >&2
        exit 1
    fi
    echo "room for $requests requests at a time in $((kib / 1024)) MiB, at most a fifth of them from one visitor"
}

# Print the container's memory limit in KiB; where it has none, the default limit of docker-compose.yml.
memory_limit_kib() {
    bytes=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || echo max)
    case $bytes in
    max | ????????????????*) echo $((768 * 1024)) ;;
    *) echo $((bytes / 1024)) ;;
    esac
}

write_limits() {
    compute_limits
    echo "worker_connections $((connections / 2));" >/run/orion-events.conf # of each of two workers
    # A visitor may have a fifth fewer requests than connections, so that the refusal of a request can still be sent.
    printf 'limit_conn requests %s;\nlimit_conn all_requests %s;\n' $((requests / 5)) "$visitors" >/run/orion-request-limits.conf
    # shellcheck disable=SC2016 # a variable of Nginx
    printf 'geo $realip_remote_addr $from_platform {\n    default 0;\n    127.0.0.0/8 1;\n    %s 1;\n    %s 0;\n}\n' \
        "$subnet" "$gateway" >/run/orion-internal.conf
}

# Have the kernel count each visitor's connections, before Nginx spends memory on them.
load_packet_filter() {
    sed "s/EACH/$((requests / 4))/; s/ALL/$visitors/" /etc/orion/network.nft | nft --define "subnet=$subnet" --define "gateway=$gateway" \
        --define "trusted={ 255.255.255.255$(trusted_addresses 4) }" --define "trusted6={ ::$(trusted_addresses 6) }" \
        --file - 2>/run/nft.log && return
    echo "the kernel cannot count a visitor's connections here, so Nginx counts them when it reads their requests:" \
        "$(head -n 1 /run/nft.log)" >&2
}

# trusted_addresses 4 | 6: print the IPv4 or IPv6 addresses and networks of ORION_TRUSTED_PROXIES, each behind a comma.
trusted_addresses() {
    for network in $(echo "${ORION_TRUSTED_PROXIES:-}" | tr ',' ' '); do
        case $network in
        *:*) kind=6 ;;
        *) kind=4 ;;
        esac
        [ "$kind" != "$1" ] || printf ',%s' "$network"
    done
}

# Print the gateway of the default route, from which the Docker engine forwards connections that it accepts itself. The
# kernel writes the bytes of the address in reverse. Without a default route print 255.255.255.255, which no client has.
gateway_address() {
    route=$(awk '$2 == "00000000" { print $3; exit }' /proc/net/route)
    route=${route:-FFFFFFFF}
    printf '%d.%d.%d.%d\n' "0x${route#??????}" "0x$(echo "$route" | cut -c 5-6)" "0x$(echo "$route" | cut -c 3-4)" \
        "0x${route%??????}"
}

# Listen on IPv6 as well, where this container has it.
write_listen() {
    : >/run/orion-listen.conf
    : >/run/orion-listen-hosts.conf
    grep -q . /proc/net/if_inet6 2>/dev/null || return 0 # [ -s ] is false for every file in /proc
    for port in '80' '443 ssl'; do
        echo "listen [::]:$port default_server reuseport so_keepalive=60s:10s:3;" >>/run/orion-listen.conf
        echo "listen [::]:$port;" >>/run/orion-listen-hosts.conf
    done
}

# Make a certificate where there is none, and renew a generated one a month before it expires. The user's own is kept.
ensure_certificate() {
    if [ -s "$tls/tls.crt" ] && [ -s "$tls/tls.key" ]; then
        if ! is_generated || openssl x509 -in "$tls/tls.crt" -noout -checkend 2592000 >/dev/null; then
            return
        fi
    elif [ -e "$tls/tls.crt" ] || [ -e "$tls/tls.key" ]; then
        echo "$tls must contain both tls.crt and tls.key, or neither" >&2
        exit 1
    fi
    make_certificate
}

# Succeed if the certificate was generated here. The file made-by-orion alone is not enough: it stays when the user
# replaces the generated pair.
is_generated() {
    [ -e "$tls/made-by-orion" ] && openssl x509 -in "$tls/tls.crt" -noout -subject 2>/dev/null | grep -q 'CN *= *Orion-Sec$'
}

# Remove a generated pair that is incomplete or does not match, because the container was stopped while it was made. A key
# is renamed and never deleted.
remove_unfinished_certificate() {
    [ -e "$tls/made-by-orion" ] && ! files_match || return 0
    [ ! -s "$tls/tls.crt" ] || is_generated || return 0
    [ ! -s "$tls/tls.key" ] || mv "$tls/tls.key" "$tls/tls.key.before"
    rm -f "$tls/tls.crt" "$tls/tls.key"
}

make_certificate() {
    names="DNS:localhost,DNS:manager_proxy,IP:127.0.0.1"
    for name in $(echo "${ORION_TLS_NAMES:-}${ORION_APPS_DOMAIN:+,*.$ORION_APPS_DOMAIN}" | tr ',' ' '); do
        case $name in
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
        esac
    done
    touch "$tls/made-by-orion"
    sign_certificate "$names" 2>/run/openssl.log || {
        cat /run/openssl.log >&2
        exit 1
    }
    # Each file is replaced by a rename, so a full disk or a stop in between leaves a complete file.
    for part in tls.key tls.crt; do
        if ! { cp "/run/certificate/$part" "$tls/new-$part" && mv "$tls/new-$part" "$tls/$part"; }; then exit 1; fi
    done
    rm -r /run/certificate
    echo "made a certificate for $names"
}

# sign_certificate NAMES: make a key and a certificate for these names in /run/certificate. The certificate is valid from
# the day before, because a client's clock may be slow. In every OpenSSL 3 only `openssl ca` can set that date.
sign_certificate() {
    rm -rf /run/certificate && mkdir /run/certificate && : >/run/certificate/database || return
    cat >/run/certificate/openssl.cnf <<EOF || return
[ca]
default_ca = own
[own]
database = /run/certificate/database
new_certs_dir = /run/certificate
rand_serial = yes
default_md = sha256
policy = names
x509_extensions = extensions
[names]
commonName = supplied
[req]
distinguished_name = nothing
[nothing]
[extensions]
basicConstraints = critical,CA:TRUE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
subjectAltName = $1
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
EOF
    openssl req -new -config /run/certificate/openssl.cnf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
        -subj "/CN=Orion-Sec" -keyout /run/certificate/tls.key -out /run/certificate/request || return
    openssl ca -batch -selfsign -notext -config /run/certificate/openssl.cnf -keyfile /run/certificate/tls.key \
        -startdate "$(date -u -d '1 day ago' +%Y%m%d%H%M%SZ)" -enddate "$(date -u -d '823 days' +%Y%m%d%H%M%SZ)" \
        -in /run/certificate/request -out /run/certificate/tls.crt
}

hash_pair() {
    cat "$tls/tls.crt" "$tls/tls.key" 2>/dev/null | sha256sum
}

# Succeed if the key belongs to the certificate. While both files are being replaced, it does not.
files_match() {
    key_public=$(openssl pkey -in "$tls/tls.key" -pubout 2>/dev/null) || return 1
    certificate_public=$(openssl x509 -in "$tls/tls.crt" -noout -pubkey 2>/dev/null) || return 1
    [ "$key_public" = "$certificate_public" ]
}

# watch_certificate SERVED: reload Nginx when the pair changes. If Nginx cannot load the new pair, it keeps the old one.
watch_certificate() {
    served=$1
    cooldown_s=0
    checks=0
    while sleep "$check_every_s"; do
        cooldown_s=$((cooldown_s > check_every_s ? cooldown_s - check_every_s : 0))
        checks=$(((checks + 1) % 360))
        # This runs in a subshell, because an incomplete pair exits.
        [ "$checks" -ne 0 ] || (ensure_certificate) || true
        found=$(hash_pair)
        if [ "$found" != "$served" ] && [ "$cooldown_s" -eq 0 ] && files_match; then
            echo "the certificate in $tls has changed: Nginx serves it from now on"
            kill -HUP "$nginx" || return 0
            served=$found
            cooldown_s=$reload_every_s
        fi
    done
}

# shellcheck disable=SC2329 # the trap calls it
shut_down() {
    kill -QUIT "$nginx" 2>/dev/null || true
    (sleep "$drain_s" && kill -TERM "$nginx") 2>/dev/null &
}

trap 'exit 0' QUIT TERM INT # the kernel delivers to process 1 only signals that it handles
# shellcheck disable=SC3045 # Debian's sh has both options
ulimit -n "$(ulimit -Hn)"
if [ "${1:-}" != filtered ]; then
    subnet=${ORION_SUBNET:-172.20.0.0/16} gateway=$(gateway_address)
    write_trusted_proxies
    write_limits
    load_packet_filter
    # Give up the capability to change the packet filter.
    drop_capabilities="--inh-caps=-all --bounding-set=-net_admin,-setpcap"
    # shellcheck disable=SC2086 # two options
    if setpriv $drop_capabilities true 2>/dev/null; then exec setpriv $drop_capabilities -- "$0" filtered; fi
fi
wait_for_secret
write_secret
write_web_hosts
write_listen
remove_unfinished_certificate
ensure_certificate
before=$(hash_pair)
# Nginx's default log file cannot be opened on a read-only file system, hence -e.
nginx -e stderr -g 'daemon off;' &
nginx=$!
trap shut_down QUIT TERM INT
watch_certificate "$before" &
# A signal interrupts the first wait; the second waits until Nginx has ended.
wait "$nginx" || true
if wait "$nginx"; then exit 0; else exit $?; fi
