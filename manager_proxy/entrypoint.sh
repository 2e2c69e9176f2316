#!/bin/sh
# Waits for the secret, sees to the certificate, then becomes Nginx.
set -eu
umask 077

secret=/run/orion-proxy/secret
tls=/etc/orion-tls

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

# The user's own pair is left alone; ours is made when there is none, and again a month before it ends.
see_to_certificate() {
    if [ -s "$tls/tls.crt" ] && [ -s "$tls/tls.key" ]; then
        if ! [ -e "$tls/made-by-orion" ] || openssl x509 -in "$tls/tls.crt" -noout -checkend 2592000 >/dev/null; then
            return
        fi
    elif [ -e "$tls/tls.crt" ] || [ -e "$tls/tls.key" ]; then
        echo "$tls needs both tls.crt and tls.key, or neither" >&2
        exit 1
    fi
    make_certificate
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
    cp /run/certificate/tls.key /run/certificate/tls.crt "$tls/" || exit 1
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

wait_for_secret
write_secret
write_web_hosts
see_to_certificate
# -e: the log that is compiled in cannot be opened on a read-only file system.
exec nginx -e stderr -g 'daemon off;'
