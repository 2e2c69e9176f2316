# shellcheck shell=bash
# Functions and settings that all scripts share. Source it from bash.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # a user's PATH may lack the directory of dockerd

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DOCKER_SOCKET=/var/run/docker.sock
# The settings that `make up` saves in .env, so that a later make up, or a plain `docker compose` command, uses the same
# platform: every setting of docker-compose.yml and the number of workers, but no variable with a fixed value.
# shellcheck disable=SC2034 # used by the scripts that source this file
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

# Print one line for each stage: its text, and the seconds that it took.
stage() {
    STAGE_STARTED=$SECONDS STAGE_OPEN=yes
    printf '%-58s' "$*"
}

done_stage() {
    STAGE_OPEN=
    printf '%4d s%s\n' $((SECONDS - STAGE_STARTED)) "${1:+  $1}"
}

# fetch LOG COMMAND...: run a command that downloads something, at most three times, and append its output to LOG.
fetch() {
    local log=$1 pause
    shift
    for pause in 5 20 ''; do
        if "$@" >>"$log" 2>&1 </dev/null; then return; fi
        [ -z "$pause" ] || sleep "$pause"
    done
    return 1
}

# need_root ACTION: fail if the user is not root and there is no sudo.
need_root() {
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "$1 needs root: run this as root, or install sudo"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then command "$@"; else sudo "$@"; fi
}

# Run a command as root if no password is needed for it, else fail. Callers can do without the result.
as_root_without_password() {
    if [ "$(id -u)" -eq 0 ]; then command "$@"; else sudo -n "$@" 2>/dev/null; fi
}

# Run a command that uses the Docker engine. It runs by sudo if this user may not use the engine's socket; sudo drops the
# environment, so the settings are passed explicitly.
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

# Run Docker Compose with the project and the settings that load_settings found.
compose() {
    local where=()
    # docker-compose 1.29 recreates a container when the project's directory changes, so the first one is kept.
    [ -z "${FIRST_DIRECTORY:-}" ] || where=(--project-directory "$FIRST_DIRECTORY" --file "$ROOT/docker-compose.yml")
    if [ "${1:-}" = exec ]; then
        local index
        index=$(index_for "${@:2}") || exit 1
        set -- exec "$index" "${@:2}"
    fi
    compose_here "${where[@]}" "$@"
}

# index_for [OPTION...] SERVICE...: print the option that makes `exec` use a running container. By default Compose uses
# number 1, which does not exist after the workers were replaced, and 1.29 prints no error then.
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
    [ -n "$number" ] || fail "no container of ${service:-the service} runs in $COMPOSE_PROJECT_NAME: make up starts the platform"
    echo "--index=$number"
}

# Run Docker Compose in this directory, whatever directory the containers were made from. load_settings has exported all
# settings; Compose does not read .env, which may belong to another platform.
compose_here() {
    if docker compose version >/dev/null 2>&1; then
        (cd "$ROOT" && docker compose --env-file scripts/none.env "$@")
    elif command -v docker-compose >/dev/null; then
        (cd "$ROOT" && with_docker docker-compose --env-file scripts/none.env "$@")
    else
        fail "Docker Compose is not installed: make up installs it"
    fi
}

# Succeed if .env has the settings of the platform that the user named.
is_kept_platform() {
    local recorded
    recorded=$(kept_setting COMPOSE_PROJECT_NAME)
    [ -z "${GIVEN_PROJECT:-}" ] || [ "$GIVEN_PROJECT" = "${recorded:-orion-sec}" ]
}

# Print a setting of .env. A value with unusual characters is in single quotes, which Compose reads as well.
kept_setting() {
    local value
    if [ -e "$ROOT/.env" ]; then value=$(sed -n "s/^$1=//p" "$ROOT/.env" | tail -n 1); fi
    if [[ ${value:-} == \'*\' ]]; then value=${value:1:-1}; fi
    echo "${value:-}"
}

kept_names() { if [ -e "$ROOT/.env" ]; then sed -nE 's/^([A-Za-z_][A-Za-z0-9_]*)=.*/\1/p' "$ROOT/.env"; fi; }

# Export the settings. A setting of the environment overrides one of .env, which overrides a default of docker-compose.yml.
load_settings() {
    GIVEN_PROJECT=${COMPOSE_PROJECT_NAME:-}
    local name value directory
    directory=$(directory_of "${GIVEN_PROJECT:-$(kept_project)}")
    # In another clone of the same platform, take over its settings.
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

# Print the directory from which the containers of a project were made, or nothing if there are no containers.
directory_of() {
    local first
    first=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$1" 2>/dev/null | tail -n 1)
    [ -n "$first" ] || return 0
    docker inspect --format '{{index .Config.Labels "com.docker.compose.project.working_dir"}}' "$first"
}

# Print the project's name: that of a platform that a plain `docker compose up` started in this directory, else orion-sec.
default_project() {
    local plain
    plain=$(basename "$ROOT" | tr '[:upper:]' '[:lower:]' | tr -cd 'a-z0-9_-')
    if [ -n "$plain" ] && [ -n "$(containers_of "$plain" manager_proxy 2>/dev/null)" ]; then
        echo "$plain"
    else
        echo orion-sec
    fi
}

# containers_of PROJECT SERVICE [docker ps options]: print the ids of the containers, running or not.
containers_of() {
    docker ps --all --quiet --filter "label=com.docker.compose.project=$1" \
        --filter "label=com.docker.compose.service=$2" "${@:3}"
}
