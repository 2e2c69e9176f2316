# shellcheck shell=bash
# What every script here shares. To be sourced by bash.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where dockerd is, for those who are not root

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DOCKER_SOCKET=/var/run/docker.sock
# What `make up` keeps in .env, so that a later make up, or a plain `docker compose` command, means the same platform:
# every setting of docker-compose.yml, and the number of workers. What the file gives a fixed value is no setting.
# shellcheck disable=SC2034 # for the scripts that source this
mapfile -t KEPT_SETTINGS < <(
    printf '%s\n' COMPOSE_PROJECT_NAME ORION_WORKERS
    grep -oE '\$\{ORION_[A-Z_]+|^ *- ORION_[A-Z_]+$' "$ROOT/docker-compose.yml" | grep -oE 'ORION_[A-Z_]+' | sort -u
)
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

# fetch LOG COMMAND...: run a command that fetches from the network up to three times, and add what it says to LOG.
fetch() {
    local log=$1 pause
    shift
    for pause in 5 20 ''; do
        if "$@" >>"$log" 2>&1 </dev/null; then return; fi
        [ -z "$pause" ] || sleep "$pause"
    done
    return 1
}

# need_root WHAT FOR
need_root() {
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "$1 needs root: run this as root, or install sudo"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then command "$@"; else sudo "$@"; fi
}

# Without a password: whoever may only talk to the engine does without what this is for.
as_root_unasked() {
    if [ "$(id -u)" -eq 0 ]; then command "$@"; else sudo -n "$@" 2>/dev/null; fi
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

# Docker Compose with the project and the settings that load_settings found.
compose() {
    local where=()
    # docker-compose 1.29 counts the directory among what a container is made from: it stays the first one's.
    [ -z "${FIRST_DIRECTORY:-}" ] || where=(--project-directory "$FIRST_DIRECTORY" --file "$ROOT/docker-compose.yml")
    if [ "${1:-}" = exec ]; then
        local index
        index=$(index_for "${@:2}") || exit 1
        set -- exec "$index" "${@:2}"
    fi
    compose_here "${where[@]}" "$@"
}

# index_for [OPTION...] SERVICE...: print the option by which `exec` takes a container that runs. By itself Compose looks
# for number 1, which a replacement of the workers removes, and 1.29 says nothing where there is none.
index_for() {
    local service='' number
    while [ $# -gt 0 ] && [ -z "$service" ]; do
        case $1 in
        -u | --user | -e | --env | -w | --workdir) shift ;;
        -*) ;;
        *) service=$1 ;;
        esac
        shift
    done
    number=$(docker ps --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
        --filter "label=com.docker.compose.service=$service" --filter label=com.docker.compose.oneoff=False \
        --format '{{.Label "com.docker.compose.container-number"}}' | sort -n | head -n 1)
    [ -n "$number" ] || fail "no container of ${service:-it} runs in $COMPOSE_PROJECT_NAME: make up starts the platform"
    echo "--index=$number"
}

# Docker Compose in this directory, whatever directory the containers were made from. Everything that is set was
# exported by load_settings: .env itself may be another platform's.
compose_here() {
    if docker compose version >/dev/null 2>&1; then
        (cd "$ROOT" && docker compose --env-file scripts/none.env "$@")
    elif command -v docker-compose >/dev/null; then
        (cd "$ROOT" && with_docker docker-compose --env-file scripts/none.env "$@")
    else
        fail "no Docker Compose here: make up installs it"
    fi
}

# Whether .env holds the settings of the platform that was named.
is_kept_platform() {
    local recorded
    recorded=$(kept_setting COMPOSE_PROJECT_NAME)
    [ -z "${GIVEN_PROJECT:-}" ] || [ "$GIVEN_PROJECT" = "${recorded:-orion-sec}" ]
}

# Print a kept setting. A value with unusual characters stands between apostrophes, as Compose reads it too.
kept_setting() {
    local value
    if [ -e "$ROOT/.env" ]; then value=$(sed -n "s/^$1=//p" "$ROOT/.env" | tail -n 1); fi
    if [[ ${value:-} == \'*\' ]]; then value=${value:1:-1}; fi
    echo "${value:-}"
}

kept_names() { if [ -e "$ROOT/.env" ]; then sed -nE 's/^([A-Za-z_][A-Za-z0-9_]*)=.*/\1/p' "$ROOT/.env"; fi; }

# Settings count in this order: the environment, .env, the defaults of docker-compose.yml.
load_settings() {
    GIVEN_PROJECT=${COMPOSE_PROJECT_NAME:-}
    local name value directory
    directory=$(directory_of "${GIVEN_PROJECT:-$(kept_project)}")
    # Another clone of the same platform: what was set there stays set here.
    if [ ! -e "$ROOT/.env" ] && [ -z "$GIVEN_PROJECT" ] && [ -n "$directory" ] && [ -r "$directory/.env" ]; then
        (umask 077 && cat "$directory/.env" >"$ROOT/.env")
    fi
    for name in $(kept_names); do
        is_kept_platform || break
        value=$(kept_setting "$name")
        if [ -n "$value" ] && [ -z "${!name+set}" ]; then export "$name=$value"; fi
    done
    export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-$(default_project)}
    directory=$(directory_of "$COMPOSE_PROJECT_NAME")
    FIRST_DIRECTORY=
    if [ -n "$directory" ] && [ "$directory" != "$ROOT" ] && [ -d "$directory" ]; then FIRST_DIRECTORY=$directory; fi
}

kept_project() {
    local recorded
    recorded=$(kept_setting COMPOSE_PROJECT_NAME)
    echo "${recorded:-$(default_project)}"
}

# Print the directory from which the containers of a project were made; nothing where there are none.
directory_of() {
    local first
    first=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$1" 2>/dev/null | tail -n 1)
    [ -n "$first" ] || return 0
    docker inspect --format '{{index .Config.Labels "com.docker.compose.project.working_dir"}}' "$first"
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
