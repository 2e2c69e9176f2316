# shellcheck shell=bash
# What every script here shares. To be sourced by bash.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where dockerd is, for those who are not root

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DOCKER_SOCKET=/var/run/docker.sock
# What `make up` keeps in .env, so that a later plain `docker compose` command means the same platform.
KEPT_SETTINGS=(COMPOSE_PROJECT_NAME ORION_SUBNET ORION_GATEWAY ORION_PROXY_ADDRESS ORION_APP_ADDRESS ORION_WORKER_RANGE
    ORION_HTTP_PORT ORION_HTTPS_PORT ORION_TLS_DIR ORION_TLS_NAMES ORION_APPS_DOMAIN)
STAGE_OPEN=

fail() {
    [ -z "$STAGE_OPEN" ] || echo >&2
    echo "orion: $*" >&2
    exit 1
}

# One line for each stage: what is done, and the seconds it took.
stage() {
    STAGE_STARTED=$SECONDS STAGE_OPEN=yes
    printf '%-58s' "$*"
}

done_stage() {
    STAGE_OPEN=
    printf '%4d s%s\n' $((SECONDS - STAGE_STARTED)) "${1:+  $1}"
}

# need_root WHAT FOR
need_root() {
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "$1 needs root: run this as root, or install sudo"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then command "$@"; else sudo "$@"; fi
}

# The engine's socket is root's unless the user is in its group. sudo drops the environment, so ours is handed on.
with_docker() {
    if [ "$(id -u)" -eq 0 ] || [ -w "$DOCKER_SOCKET" ] || [ -n "${DOCKER_HOST:-}" ] || ! command -v sudo >/dev/null; then
        command "$@"
    else
        local settings
        mapfile -t settings < <(env | grep -E '^(ORION|COMPOSE|DOCKER)_[A-Z_]*=' || true)
        as_root env "${settings[@]}" "$@"
    fi
}

docker() { with_docker "$(type -P docker || echo docker)" "$@"; }

has_compose() { docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; }

compose() {
    if docker compose version >/dev/null 2>&1; then
        (cd "$ROOT" && docker compose "$@")
    elif command -v docker-compose >/dev/null; then
        (cd "$ROOT" && with_docker docker-compose "$@")
    else
        fail "no Docker Compose here: make up installs it"
    fi
}

kept_setting() { if [ -e "$ROOT/.env" ]; then sed -n "s/^$1=//p" "$ROOT/.env" | tail -n 1; fi; }

# Settings count in this order: the environment, .env, the defaults of docker-compose.yml.
load_settings() {
    # shellcheck disable=SC2034 # for the scripts that source this
    GIVEN_PROJECT=${COMPOSE_PROJECT_NAME:-}
    local name value
    for name in "${KEPT_SETTINGS[@]}"; do
        value=$(kept_setting "$name")
        if [ -n "$value" ] && [ -z "${!name+set}" ]; then export "$name=$value"; fi
    done
    export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-$(default_project)}
}

# A platform that was started by a plain `docker compose up` in this directory is gone on with, under its name.
default_project() {
    local plain
    plain=$(basename "$ROOT" | tr '[:upper:]' '[:lower:]' | tr -cd 'a-z0-9_-')
    if [ -n "$plain" ] && [ -n "$(containers_of "$plain" manager_proxy 2>/dev/null)" ]; then
        echo "$plain"
    else
        echo orion-sec
    fi
}

# containers_of PROJECT SERVICE [docker ps options]: identities, running or not.
containers_of() {
    docker ps --all --quiet --filter "label=com.docker.compose.project=$1" \
        --filter "label=com.docker.compose.service=$2" "${@:3}"
}
