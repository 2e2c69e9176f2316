#!/bin/bash
# Provide a running Docker engine with Compose: install what is missing, and start the engine if it does not run.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/packages.sh"

engine_answers() { docker info >/dev/null 2>&1; }

install_engine() {
    local wanted=()
    if ! engine_answers && ! command -v dockerd >/dev/null; then
        wanted+=(docker.io)
        # Newer releases package the client separately.
        if ! type -P docker >/dev/null && apt_has docker-cli; then wanted+=(docker-cli); fi
    fi
    if ! has_compose; then
        # Where both packages exist (Ubuntu), docker-compose does not run with the release's own Python.
        if apt_has docker-compose-v2; then wanted+=(docker-compose-v2); else wanted+=(docker-compose); fi
    fi
    install_packages "${wanted[@]}"
}

start_engine() {
    engine_answers && return
    if [ -S "$DOCKER_SOCKET" ] && ! [ -w "$DOCKER_SOCKET" ]; then need_root "using the Docker engine (or being in the group docker)"; fi
    need_root "starting the Docker engine"
    stage "Starting the Docker engine"
    if ! start_by_service_manager || ! wait_for_engine 20; then
        # Without a service manager, start the engine directly, in a session of its own. It outlives this script, so it must
        # not inherit the script's output: a program that reads our output would wait until the engine ends.
        (as_root setsid sh -c 'exec dockerd >>/var/log/orion-dockerd.log 2>&1') </dev/null >/dev/null 2>&1 &
        wait_for_engine 30 || fail "the Docker engine did not start: see /var/log/orion-dockerd.log, or journalctl -u docker"
    fi
    done_stage
}

start_by_service_manager() {
    if [ -d /run/systemd/system ]; then
        as_root systemctl start docker
    elif [ -x /etc/init.d/docker ]; then
        as_root service docker start
    else
        return 1
    fi >/dev/null 2>&1
}

wait_for_engine() {
    local deadline=$((SECONDS + $1))
    until engine_answers; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.5
    done
}

install_engine
start_engine
