#!/bin/bash
# A Docker engine with Compose, running: installs what is missing and says so, starts what does not run.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/packages.sh"

engine_answers() { docker info >/dev/null 2>&1; }

install_engine() {
    local wanted=()
    if ! engine_answers && ! command -v dockerd >/dev/null; then
        wanted+=(docker.io)
        # Newer releases have the client in a package of its own.
        if ! type -P docker >/dev/null && apt_knows docker-cli; then wanted+=(docker-cli); fi
    fi
    if ! has_compose; then
        # Where both exist (Ubuntu), the older one does not run on the release's own Python.
        if apt_knows docker-compose-v2; then wanted+=(docker-compose-v2); else wanted+=(docker-compose); fi
    fi
    install_packages "${wanted[@]}"
}

start_engine() {
    engine_answers && return
    if [ -S "$DOCKER_SOCKET" ] && ! [ -w "$DOCKER_SOCKET" ]; then need_root "talking to the Docker engine (or the group docker)"; fi
    need_root "starting the Docker engine"
    stage "Starting the Docker engine"
    if ! by_service_manager || ! engine_within 20; then
        # No service manager that would do it: on its own, and out of this terminal's reach.
        # It outlives this script, so it may hold nothing of it: whoever reads our output would wait for the engine's end.
        (as_root setsid sh -c 'exec dockerd >>/var/log/orion-dockerd.log 2>&1') </dev/null >/dev/null 2>&1 &
        engine_within 30 || fail "the Docker engine does not start: see /var/log/orion-dockerd.log, or journalctl -u docker"
    fi
    done_stage
}

by_service_manager() {
    if [ -d /run/systemd/system ]; then
        as_root systemctl start docker
    elif [ -x /etc/init.d/docker ]; then
        as_root service docker start
    else
        return 1
    fi >/dev/null 2>&1
}

engine_within() {
    local deadline=$((SECONDS + $1))
    until engine_answers; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.5
    done
}

install_engine
start_engine
