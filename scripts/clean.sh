#!/bin/bash
# Remove the platform with all its data: containers, network, volumes, the images built here, the command, and .env.
# The Docker engine, the base image and the packages that apt installed are kept.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/host_filter.sh"

load_settings
if [ "${CONFIRM:-}" != yes ]; then
    [ -t 0 ] || fail "make clean needs a confirmation, and there is no terminal to ask at: run CONFIRM=yes make clean"
    read -r -p "Remove $COMPOSE_PROJECT_NAME with every rental, token and key, and the command orion? [y/N] " answer
    [[ $answer == [yY]* ]] || fail "nothing was removed"
fi
stage "Removing containers, network, volumes and images"
remove_host_rules
compose down --volumes --rmi local --remove-orphans --timeout 5 >/dev/null 2>&1 || fail "docker compose down failed: run it to see the reason"
done_stage
if [ -z "$GIVEN_PROJECT" ] || [ "$GIVEN_PROJECT" = "$(kept_setting COMPOSE_PROJECT_NAME)" ]; then
    stage "Removing the command"
    "$(dirname "$0")/command.sh" remove
    rm -f "$ROOT/.env"
    done_stage
fi
