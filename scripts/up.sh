#!/bin/bash
# From a bare Debian or Ubuntu to a platform whose workers are all ready. Run again it changes nothing that runs.
#   WORKERS=N (default: as many as there are, else 3) and the settings of docker-compose.yml, such as ORION_SUBNET.
HERE=$(dirname "$0")
. "$HERE/common.sh"
. "$HERE/packages.sh"
. "$HERE/python.sh"
. "$HERE/addresses.sh"

READY_WITHIN_S=${ORION_READY_WITHIN_S:-150}
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

# An explicit name of another project (a test's) leaves .env alone.
keep_settings() {
    local name recorded
    recorded=$(kept_setting COMPOSE_PROJECT_NAME)
    if [ -n "$GIVEN_PROJECT" ] && [ "$GIVEN_PROJECT" != "${recorded:-orion-sec}" ]; then return; fi
    if [ -z "${ORION_TLS_NAMES+set}" ] && [ -z "$(containers_of "$COMPOSE_PROJECT_NAME" manager_proxy)" ]; then
        ORION_TLS_NAMES=$(hostname)
        export ORION_TLS_NAMES
    fi
    for name in "${KEPT_SETTINGS[@]}"; do
        if [ -n "${!name:-}" ] && [ "${!name}" != "$(kept_setting "$name")" ]; then keep_setting "$name" "${!name}"; fi
    done
}

keep_setting() {
    [ -e "$ROOT/.env" ] || echo "# Kept by make up; it counts for plain docker compose commands as well." >"$ROOT/.env"
    sed -i "/^$1=/d" "$ROOT/.env"
    echo "$1=$2" >>"$ROOT/.env"
}

number_of_workers() {
    local existing
    existing=$(containers_of "$COMPOSE_PROJECT_NAME" worker | wc -l)
    echo "${WORKERS:-$((existing > 0 ? existing : 3))}"
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
    logged "$LOGS/build.log" "building the images" compose build "${parallel[@]}"
    done_stage
}

install_command() {
    ensure_python
    stage "Installing the command orion"
    logged "$LOGS/command.log" "installing the command" "$HERE/command.sh" install
    done_stage
}

start() {
    stage "Starting proxy, manager and $1 worker(s)"
    logged "$LOGS/start.log" "starting" compose up --detach --scale "worker=$1"
    done_stage
}

ready_workers() {
    local app
    app=$(containers_of "$COMPOSE_PROJECT_NAME" manager_app | head -n 1)
    docker exec "$app" orion status --json 2>/dev/null |
        "$("$HERE/command.sh" python)" -c 'import json, sys; print(json.load(sys.stdin)["workers"].get("ready", 0))' 2>/dev/null ||
        echo 0
}

gives_up() {
    local service
    for service in manager_app manager_proxy worker; do
        while read -r container; do
            [ "$(docker inspect --format '{{.RestartCount}}' "$container")" -lt 4 ] || return 0
        done < <(containers_of "$COMPOSE_PROJECT_NAME" "$service")
    done
    return 1
}

wait_until_ready() {
    local ready=0 deadline=$((SECONDS + READY_WITHIN_S))
    stage "Waiting until $1 worker(s) are ready"
    while ready=$(ready_workers) && [ "$ready" -lt "$1" ]; do
        if [ $SECONDS -ge $deadline ] || gives_up; then explain "$ready of $1 workers are ready after $((SECONDS - STAGE_STARTED)) s"; fi
        sleep 0.3
    done
    done_stage
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

Orion-Sec is up: $1 worker(s) ready, $SECONDS s in all.
  Address:      http://localhost:$http and https://localhost:$https (a certificate of its own)
  Admin token:  make token
Try next:
  orion login http://localhost:$http --token-file <(make -s token)
  orion rent --name first --ttl 2h
  orion ssh first
TEXT
}

if [ -n "${ORION_SUBNET:-}" ]; then derive_addresses; fi
[[ ${WORKERS:-3} =~ ^[0-9]+$ ]] || fail "WORKERS=$WORKERS is no number"
"$HERE/engine.sh" 9>&-
load_settings
check_subnet
[ "${ORION_HTTP_PORT:-8080}" != "${ORION_HTTPS_PORT:-8443}" ] || fail "HTTP and HTTPS cannot share port ${ORION_HTTP_PORT:-8080}"
check_port ORION_HTTP_PORT 8080
check_port ORION_HTTPS_PORT 8443
check_disk
"$HERE/base-image.sh" 9>&-
LOGS=$(mktemp -d /tmp/orion-up.XXXXXX)
keep_settings
build
install_command
wanted=$(number_of_workers)
start "$wanted"
wait_until_ready "$wanted"
rmdir "$LOGS"
say_what_next "$wanted"
