#!/bin/bash
# From a bare Debian or Ubuntu to a platform whose workers are all ready. Run again it changes nothing that was not asked
# for; what it changes, it does by planned moves (rollout.py), after asking where somebody rents (CONFIRM=yes answers).
#   WORKERS=N (default: as many as there are, else 3) and the settings of docker-compose.yml, such as ORION_SUBNET: what
#   was set once stays set, in .env; ORION_SLOTS= (empty) goes back to the default.
HERE=$(dirname "$0")
. "$HERE/common.sh"
. "$HERE/packages.sh"
. "$HERE/python.sh"
. "$HERE/addresses.sh"
. "$HERE/host_filter.sh"

FIRST_BUILD_MB=3000

# Two at once would get in each other's way. What outlives this script must not hold the lock: hence 9>&- below.
exec 9<"$ROOT/Makefile"
flock --nonblock 9 || {
    echo "Another make up is at work here: waiting for it"
    flock --wait 900 9 || fail "the other make up does not end"
}

check_disk() {
    local free
    [ -z "$(containers_of "$COMPOSE_PROJECT_NAME" worker)" ] || return 0
    free=$(df --portability --block-size=1M "$(docker info --format '{{.DockerRootDir}}')" 2>/dev/null | awk 'NR == 2 { print $4 }')
    [ -z "$free" ] || [ "$free" -ge "$FIRST_BUILD_MB" ] ||
        fail "too little disk: building needs $FIRST_BUILD_MB MB where Docker keeps its images, and $free MB are free"
}

# What was typed, to be typed again.
typed_command() {
    local name words=
    for name in WORKERS "${KEPT_SETTINGS[@]}"; do
        [ -n "${!name+set}" ] || continue
        if [ "$name" = ORION_DATABASE_URL ]; then
            words+="$name=\"\$$name\" " # it may hold a password
        else
            words+="$name=$(printf %q "${!name}") "
        fi
    done
    echo "${words}make up"
}

# The names of the certificate stay those of the proxy that is there; a first one is given this machine's.
name_certificate() {
    local proxy
    [ -z "${ORION_TLS_NAMES+set}" ] || return 0
    proxy=$(containers_of "$COMPOSE_PROJECT_NAME" manager_proxy | head -n 1)
    if [ -n "$proxy" ]; then
        ORION_TLS_NAMES=$(docker inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$proxy" | sed -n 's/^ORION_TLS_NAMES=//p')
    else
        ORION_TLS_NAMES=$(hostname)
    fi
    if [ -n "$ORION_TLS_NAMES" ]; then export ORION_TLS_NAMES; else unset ORION_TLS_NAMES; fi
}

# What was given empty goes back to its default.
forget_empty_settings() {
    local name
    for name in "${KEPT_SETTINGS[@]}"; do
        [ -z "${!name+set}" ] || [ -n "${!name}" ] || unset "$name"
    done
}

# An explicit name of another project (a test's) leaves .env alone.
keep_settings() {
    local name
    is_kept_platform || return 0
    export ORION_WORKERS=${WORKERS:-${ORION_WORKERS:-}}
    for name in "${KEPT_SETTINGS[@]}"; do
        if [ "${!name:-}" != "$(kept_setting "$name")" ]; then keep_setting "$name" "${!name:-}"; fi
    done
}

# keep_setting NAME VALUE, which may be empty. .env may hold a password of the database.
keep_setting() {
    local value=$2
    [[ $value != *[\'$'\n'\']* && $value != *\'* ]] || fail "$1 cannot be kept: it has an apostrophe or a line break in it"
    [[ $value =~ ^[A-Za-z0-9._/:,=@%+-]*$ ]] || value="'$value'"
    [ -e "$ROOT/.env" ] || (umask 077 && echo "# Kept by make up; it counts for plain docker compose commands as well." >"$ROOT/.env")
    sed -i "/^$1=/d" "$ROOT/.env"
    [ -z "$value" ] || echo "$1=$value" >>"$ROOT/.env"
}

# logged FILE WHAT COMMAND...: its output is shown only when it fails.
logged() {
    local log=$1 what=$2
    shift 2
    "$@" >"$log" 2>&1 9>&- || {
        tail -n 15 "$log" >&2
        fail "$what failed; everything it said: $log"
    }
    rm -f "$log"
}

build() {
    stage "Building the three images"
    local parallel=()
    docker compose version >/dev/null 2>&1 || parallel=(--parallel)
    logged "$LOGS/build.log" "building the images" compose_here build "${parallel[@]}"
    done_stage
}

install_command() {
    ensure_python
    stage "Installing the command orion"
    logged "$LOGS/command.log" "installing the command" "$HERE/command.sh" install
    done_stage
}

rollout() { "$("$HERE/command.sh" python)" -B "$HERE/rollout.py" "$@" 9>&-; }

# Start what stands there, then say what would change for those who rent, and ask.
ask() { rollout ask || exit $?; }

go() {
    local status=0
    ORION_WHY=$LOGS/why rollout go || status=$?
    [ "$status" -ne 3 ] || explain "$(cat "$LOGS/why")"
    [ "$status" -eq 0 ] || exit "$status"
}

# The first part of the platform that is not well, and the last that it said.
explain() {
    local service container
    for service in manager_app manager_proxy worker; do
        while read -r container; do
            is_well "$container" || say_last_words "$1" "$container"
        done < <(containers_of "$COMPOSE_PROJECT_NAME" "$service")
    done
    say_last_words "$1" "$(containers_of "$COMPOSE_PROJECT_NAME" manager_app | head -n 1)"
}

is_well() {
    local state
    state=$(docker inspect --format '{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{end}} {{.RestartCount}}' "$1")
    [[ $state == "running healthy 0" || $state == "running  0" || $state == "running starting 0" ]]
}

say_last_words() {
    echo >&2
    docker logs --tail 15 "$2" >&2 || true
    STAGE_OPEN='' fail "$1; above: the last lines of $(docker inspect --format '{{.Name}}' "$2" | tr -d /). More: make logs"
}

say_what_next() {
    local http=${ORION_HTTP_PORT:-8080} https=${ORION_HTTPS_PORT:-8443}
    cat <<TEXT

Orion-Sec is up: $(containers_of "$COMPOSE_PROJECT_NAME" worker | wc -l) worker(s) ready, $SECONDS s in all.
  Address:      http://localhost:$http and https://localhost:$https (a certificate of its own)
  Admin token:  make token
Try next:
  orion login http://localhost:$http --token-file <(make -s token)
  orion rent --name first --ttl 2h
  orion ssh first
TEXT
}

UP_COMMAND=$(typed_command)
export UP_COMMAND
if [ -n "${ORION_SUBNET:-}" ]; then derive_addresses; fi
[[ ${WORKERS:-3} =~ ^[0-9]+$ ]] || fail "WORKERS=$WORKERS is no number"
"$HERE/engine.sh" 9>&-
load_settings
forget_empty_settings
check_subnet
ORION_HOST_ADDRESSES=$(host_addresses)
if [ -n "$ORION_HOST_ADDRESSES" ]; then export ORION_HOST_ADDRESSES; else unset ORION_HOST_ADDRESSES; fi
[ "${ORION_HTTP_PORT:-8080}" != "${ORION_HTTPS_PORT:-8443}" ] || fail "HTTP and HTTPS cannot share port ${ORION_HTTP_PORT:-8080}"
check_port ORION_HTTP_PORT 8080
check_port ORION_HTTPS_PORT 8443
check_disk
"$HERE/base-image.sh" 9>&-
LOGS=$(mktemp -d /tmp/orion-up.XXXXXX)
name_certificate
build
install_command
ask
keep_settings
go
close_host
rmdir "$LOGS"
say_what_next
