#!/bin/sh
# Waits for the secret, sees to the certificate, then runs Nginx, and has it take a new certificate while it runs.
set -eu
umask 077

secret=/run/orion-proxy/secret
tls=/etc/orion-tls
# What Nginx takes of its memory without any connection: itself, with two workers that a reload has left to what they carry
# (80 MiB), the zones of limits.conf and of TLS when they are full (81 MiB), and /tmp and /run (17 MiB).
kib_without=$((178 * 1024))
# What one connection may take of it: see manager_proxy/limits.conf.
kib_each=140
# A renewed certificate is served so many seconds later at most; a second one not sooner than half an hour after it, for
# each reload may leave two workers of Nginx to what they still carry (worker_shutdown_timeout), and they have a limit.
look_every_s=10
reload_every_s=1800
goodbye_s=3

wait_for_secret() {
    waited=0
    while ! [ -s "$secret" ]; do
        if [ $((waited % 30)) -eq 0 ]; then
            echo "waiting for $secret, which manager_app makes at its first start (${waited} s so far)"
        fi
        sleep 1
        waited=$((waited + 1))
    done
}

# On tmpfs, for root alone: the image and the workers of Nginx never hold the secret in a file.
write_secret() {
    value=$(cat "$secret")
    case $value in
    *[!A-Za-z0-9._-]*)
        echo "$secret holds characters that no secret of Orion-Sec has: make clean, then make up" >&2
        exit 1
        ;;
    esac
    printf 'proxy_set_header X-Orion-Proxy-Secret %s;\n' "$value" >/run/orion-secret.conf
}

# The names under which web ports have hosts of their own. What is under localhost is each browser's own machine.
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

# Who may say where a request comes from: addresses and networks, separated by commas. By default nobody.
write_trusted() {
    : >/run/orion-trusted.conf
    trusted=$(echo "${ORION_TRUSTED_PROXIES:-}" | tr ',' ' ')
    for network in $trusted; do
        case $network in
        *[!0-9a-fA-F.:/]* | */*/* | */0 | */00 | */)
            echo "ORION_TRUSTED_PROXIES: $network is no address and no network such as 192.0.2.7 or 10.1.0.0/24" >&2
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

# As many connections as there is memory for if each took the most that one can, those to the manager and the workers
# included: at any time half of them may carry a request. A visitor has a quarter of those, and all together have seven
# eighths: the rest is for the workers.
count_places() {
    kib=$(memory_limit_kib)
    places=$(((kib - kib_without) / kib_each))
    # Each is a file, of one of two workers, which have some others besides.
    # shellcheck disable=SC3045 # Debian's sh knows it
    files=$(ulimit -n)
    if [ "$files" != unlimited ] && [ "$places" -gt $((2 * (files - 100))) ]; then
        places=$((2 * (files - 100)))
    fi
    requests=$((places / 2))
    visitors=$((requests * 7 / 8))
    if [ "$requests" -lt 256 ]; then
        echo "ORION_PROXY_MEMORY is too little: $((kib / 1024))m, and manager_proxy needs $(((kib_without + 512 * kib_each) / 1024 + 1))m or more" >&2
        exit 1
    fi
    echo "room for $requests requests at a time in $((kib / 1024)) MiB, a quarter of them of one visitor"
}

# Without a limit as though it were that of docker-compose.yml.
memory_limit_kib() {
    bytes=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || echo max)
    case $bytes in
    max | ????????????????*) echo $((768 * 1024)) ;;
    *) echo $((bytes / 1024)) ;;
    esac
}

write_places() {
    count_places
    echo "worker_connections $((places / 2));" >/run/orion-events.conf # of each of two workers
    # A fifth less than its connections, so that who comes so far is told why.
    printf 'limit_conn requests %s;\nlimit_conn all_requests %s;\n' $((requests / 5)) "$visitors" >/run/orion-places.conf
    # shellcheck disable=SC2016 # a variable of Nginx
    printf 'geo $realip_remote_addr $inside {\n    default 0;\n    127.0.0.0/8 1;\n    %s 1;\n    %s 0;\n}\n' \
        "$subnet" "$gateway" >/run/orion-inside.conf
}

# A visitor's connections are counted by the kernel, before any memory of Nginx is spent on them.
set_filter() {
    sed "s/EACH/$((requests / 4))/; s/ALL/$visitors/" /etc/orion/network.nft | nft --define "subnet=$subnet" --define "gateway=$gateway" \
        --define "trusted={ 255.255.255.255$(trusted_of 4) }" --define "trusted6={ ::$(trusted_of 6) }" \
        --file - 2>/run/nft.log && return
    echo "the kernel cannot count the connections of a visitor here, so they are counted only when their requests are read:" \
        "$(head -n 1 /run/nft.log)" >&2
}

# The addresses and networks of ORION_TRUSTED_PROXIES of one kind, each behind a comma.
trusted_of() {
    for network in $(echo "${ORION_TRUSTED_PROXIES:-}" | tr ',' ' '); do
        case $network in
        *:*) kind=6 ;;
        *) kind=4 ;;
        esac
        [ "$kind" != "$1" ] || printf ',%s' "$network"
    done
}

# By which the engine brings connections that it carries itself: the default route, whose address the kernel writes
# backwards. 255.255.255.255, which nobody has, where there is none.
gateway_address() {
    route=$(awk '$2 == "00000000" { print $3; exit }' /proc/net/route)
    route=${route:-FFFFFFFF}
    printf '%d.%d.%d.%d\n' "0x${route#??????}" "0x$(echo "$route" | cut -c 5-6)" "0x$(echo "$route" | cut -c 3-4)" \
        "0x${route%??????}"
}

# By IPv6 as well, where this container has it.
write_listen() {
    : >/run/orion-listen.conf
    : >/run/orion-listen-too.conf
    grep -q . /proc/net/if_inet6 2>/dev/null || return 0 # -s says of every file there that it is empty
    for port in '80' '443 ssl'; do
        echo "listen [::]:$port default_server reuseport so_keepalive=60s:10s:3;" >>/run/orion-listen.conf
        echo "listen [::]:$port;" >>/run/orion-listen-too.conf
    done
}

# The user's own pair is left alone; ours is made when there is none, and again a month before it ends.
see_to_certificate() {
    if [ -s "$tls/tls.crt" ] && [ -s "$tls/tls.key" ]; then
        if ! is_ours || openssl x509 -in "$tls/tls.crt" -noout -checkend 2592000 >/dev/null; then
            return
        fi
    elif [ -e "$tls/tls.crt" ] || [ -e "$tls/tls.key" ]; then
        echo "$tls needs both tls.crt and tls.key, or neither" >&2
        exit 1
    fi
    make_certificate
}

# The mark stays where the user's own pair took the place of ours.
is_ours() {
    [ -e "$tls/made-by-orion" ] && openssl x509 -in "$tls/tls.crt" -noout -subject 2>/dev/null | grep -q 'CN *= *Orion-Sec$'
}

# Ours was being made when the container was stopped: a part is missing, or the two do not fit. No key is thrown away.
mend_certificate() {
    [ -e "$tls/made-by-orion" ] && ! is_whole || return 0
    [ ! -s "$tls/tls.crt" ] || is_ours || return 0
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
    # Each whole in its place: a disk that is full, or a stop in between, leaves the pair before.
    for part in tls.key tls.crt; do
        if ! { cp "/run/certificate/$part" "$tls/new-$part" && mv "$tls/new-$part" "$tls/$part"; }; then exit 1; fi
    done
    rm -r /run/certificate
    echo "made a certificate for $names"
}

# It begins a day before it is made, for a client's clock may be late. Only `openssl ca` can say so in every OpenSSL 3.
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

pair() {
    cat "$tls/tls.crt" "$tls/tls.key" 2>/dev/null | sha256sum
}

# While the two files are being replaced they do not fit together.
is_whole() {
    of_key=$(openssl pkey -in "$tls/tls.key" -pubout 2>/dev/null) || return 1
    of_certificate=$(openssl x509 -in "$tls/tls.crt" -noout -pubkey 2>/dev/null) || return 1
    [ "$of_key" = "$of_certificate" ]
}

# Nginx keeps what it serves where it cannot take the new pair.
watch_certificate() {
    served=$1
    waits_s=0
    looks=0
    while sleep "$look_every_s"; do
        waits_s=$((waits_s > look_every_s ? waits_s - look_every_s : 0))
        looks=$(((looks + 1) % 360))
        # In a shell of its own, which half a pair ends.
        [ "$looks" -ne 0 ] || (see_to_certificate) || true
        found=$(pair)
        if [ "$found" != "$served" ] && [ "$waits_s" -eq 0 ] && is_whole; then
            echo "the certificate in $tls has changed: it is served from now on"
            kill -HUP "$nginx" || return 0
            served=$found
            waits_s=$reload_every_s
        fi
    done
}

# shellcheck disable=SC2329 # by the trap
end() {
    kill -QUIT "$nginx" 2>/dev/null || true
    (sleep "$goodbye_s" && kill -TERM "$nginx") 2>/dev/null &
}

trap 'exit 0' QUIT TERM INT # process 1 gets no signal that it has no handler for
# shellcheck disable=SC3045 # Debian's sh knows both
ulimit -n "$(ulimit -Hn)"
if [ "${1:-}" != filtered ]; then
    subnet=${ORION_SUBNET:-172.20.0.0/16} gateway=$(gateway_address)
    write_trusted
    write_places
    set_filter
    # Nothing that runs here changes the filter any more.
    less="--inh-caps=-all --bounding-set=-net_admin,-setpcap"
    # shellcheck disable=SC2086 # two options
    if setpriv $less true 2>/dev/null; then exec setpriv $less -- "$0" filtered; fi
fi
wait_for_secret
write_secret
write_web_hosts
write_listen
mend_certificate
see_to_certificate
before=$(pair)
# -e: the log that is compiled in cannot be opened on a read-only file system.
nginx -e stderr -g 'daemon off;' &
nginx=$!
trap end QUIT TERM INT
watch_certificate "$before" &
# A signal ends the first wait; the second is for the end of Nginx itself.
wait "$nginx" || true
if wait "$nginx"; then exit 0; else exit $?; fi
