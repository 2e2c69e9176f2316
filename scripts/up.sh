#!/bin/bash
# Bring a bare Debian or Ubuntu machine to a platform whose workers are all ready. Run again, the script changes only what
# was asked for. It replaces workers by planned migrations (rollout.py), and asks first if there are rentals (CONFIRM=yes
# answers).
#   WORKERS=N (default: as many as there are, else 3) and the settings of docker-compose.yml, such as ORION_SUBNET, are
#   saved in .env; an empty setting, such as ORION_SLOTS=, restores the default.
HERE=$(dirname "$0")
. "$HERE/common.sh"
. "$HERE/packages.sh"
. "$HERE/python.sh"
. "$HERE/addresses.sh"
. "$HERE/host_filter.sh"

FIRST_BUILD_MB=3000

# Only one make up runs at a time. Processes that outlive this script must not inherit the lock, hence 9>&- below.
exec 9<"$ROOT/Makefile"
flock --nonblock 9 || {
    echo "Another make up is running here: waiting for it"
    flock --wait 900 9 || fail "the other make up did not end within 900 s"
}

check_disk() {
    local free
    [ -z "$(containers_of "$COMPOSE_PROJECT_NAME" worker)" ] || return 0
    free=$(df --portability --block-size=1M "$(docker info --format '{{.DockerRootDir}}')" 2>/dev/null | awk 'NR == 2 { print $4 }')
    [ -z "$free" ] || [ "$free" -ge "$FIRST_BUILD_MB" ] ||
        fail "not enough disk space: building needs $FIRST_BUILD_MB MB where Docker keeps its images, and $free MB are free"
}

# Print the command that the user typed, with its settings.
typed_command() {
    local name words=
    for name in WORKERS "${KEPT_SETTINGS[@]}"; do
        [ -n "${!name+set}" ] || continue
        if [ "$name" = ORION_DATABASE_URL ]; then
            words+="$name=\"\$$name\" " # the value may contain a password
        else
            words+="$name=$(printf %q "${!name}") "
        fi
    done
    echo "${words}make up"
}

# Choose the names of the certificate: those of the existing proxy, else this machine's name.
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

# Unset the settings that are empty, so that they have their defaults.
unset_empty_settings() {
    local name
    for name in "${KEPT_SETTINGS[@]}"; do
        [ -z "${!name+set}" ] || [ -n "${!name}" ] || unset "$name"
    done
}

# Save the settings in .env, unless the user named another project than that of .env, as tests do.
keep_settings() {
    local name
    is_kept_platform || return 0
    export ORION_WORKERS=${WORKERS:-${ORION_WORKERS:-}}
    for name in "${KEPT_SETTINGS[@]}"; do
        if [ "${!name:-}" != "$(kept_setting "$name")" ]; then keep_setting "$name" "${!name:-}"; fi
    done
}

# keep_setting NAME VALUE: save a setting in .env, or remove it there if the value is empty. Only the user can read .env,
# because it may contain a password of the database.
keep_setting() {
    local value=$2
    [[ $value != *[\'$'\n'\']* && $value != *\'* ]] || fail "$1 cannot be saved: its value has an apostrophe or a line break"
    [[ $value =~ ^[A-Za-z0-9._/:,=@%+-]*$ ]] || value="'$value'"
    [ -e "$ROOT/.env" ] || (umask 077 && echo "# Saved by make up; plain docker compose commands use these settings as well." >"$ROOT/.env")
    sed -i "/^$1=/d" "$ROOT/.env"
    [ -z "$value" ] || echo "$1=$value" >>"$ROOT/.env"
}

# run_logged FILE TEXT COMMAND...: run a command, and show its output only if it fails.
run_logged() {
    local log=$1 what=$2
    shift 2
    "$@" >"$log" 2>&1 9>&- || {
        tail -n 15 "$log" >&2
        fail "$what failed; its whole output: $log"
    }
    rm -f "$log"
}

build() {
    stage "Building the three images"
    local parallel=()
    docker compose version >/dev/null 2>&1 || parallel=(--parallel)
    run_logged "$LOGS/build.log" "building the images" compose_here build "${parallel[@]}"
    done_stage
}

install_command() {
    ensure_python
    stage "Installing the command orion"
    run_logged "$LOGS/command.log" "installing the command" "$HERE/command.sh" install
    done_stage
}

rollout() { "$("$HERE/command.sh" python)" -B "$HERE/rollout.py" "$@" 9>&-; }

# Start the containers that exist, print what would change for rentals, and ask.
ask() { rollout ask || exit $?; }

change_platform() {
    local status=0
    ORION_WHY=$LOGS/why rollout apply || status=$?
    [ "$status" -ne 3 ] || fail_with_cause "$(cat "$LOGS/why")"
    [ "$status" -eq 0 ] || exit "$status"
}

# fail_with_cause REASON: fail, and show the last lines of the log of the first unhealthy container.
fail_with_cause() {
    local service container
    for service in manager_app manager_proxy worker; do
        while read -r container; do
            is_healthy "$container" || fail_with_log "$1" "$container"
        done < <(containers_of "$COMPOSE_PROJECT_NAME" "$service")
    done
    fail_with_log "$1" "$(containers_of "$COMPOSE_PROJECT_NAME" manager_app | head -n 1)"
}

is_healthy() {
    local state
    state=$(docker inspect --format '{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{end}} {{.RestartCount}}' "$1")
    [[ $state == "running healthy 0" || $state == "running  0" || $state == "running starting 0" ]]
}

fail_with_log() {
    echo >&2
    docker logs --tail 15 "$2" >&2 || true
    STAGE_OPEN='' fail "$1; the lines above are the last ones of $(docker inspect --format '{{.Name}}' "$2" | tr -d /). More: make logs"
}

print_next_steps() {
    local http=${ORION_HTTP_PORT:-8080} https=${ORION_HTTPS_PORT:-8443}
    cat <<TEXT

Orion-Sec is up: $(containers_of "$COMPOSE_PROJECT_NAME" worker | wc -l) worker(s) ready, $SECONDS s in all.
  Address:      http://localhost:$http and https://localhost:$https (a self-signed certificate)
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
[[ ${WORKERS:-3} =~ ^[0-9]+$ ]] || fail "WORKERS=$WORKERS is not a number"
"$HERE/engine.sh" 9>&-
load_settings
unset_empty_settings
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
change_platform
add_host_rules
rmdir "$LOGS"
print_next_steps
