#!/bin/bash
# Removes the platform with all its data: containers, network, volumes, the images built here, the command, .env.
# The engine, the base image and what apt installed stay.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/host_filter.sh"

load_settings
if [ "${CONFIRM:-}" != yes ]; then
    [ -t 0 ] || fail "make clean asks before it removes: CONFIRM=yes make clean answers it"
    read -r -p "Remove $COMPOSE_PROJECT_NAME with every rental, token and key, and the command orion? [y/N] " answer
    [[ $answer == [yY]* ]] || fail "nothing was removed"
fi
stage "Removing containers, network, volumes and images"
reopen_host
compose down --volumes --rmi local --remove-orphans --timeout 5 >/dev/null 2>&1 || fail "docker compose down failed: run it to see why"
done_stage
if [ -z "$GIVEN_PROJECT" ] || [ "$GIVEN_PROJECT" = "$(kept_setting COMPOSE_PROJECT_NAME)" ]; then
    stage "Removing the command"
    "$(dirname "$0")/command.sh" remove
    rm -f "$ROOT/.env"
    done_stage
fi
