#!/bin/bash
# Stops the platform and keeps everything: containers, volumes, images. make up goes on where it was.
. "$(dirname "$0")/common.sh"

# The workers first: while they stop, the manager copies what runs on them a last time, and parks it. make up, or docker
# compose up after docker compose down, brings it back on whatever workers there are then.
load_settings
stage "Parking what runs, and stopping the workers"
compose stop worker >/dev/null 2>&1 || fail "they do not stop: docker ps tells more"
done_stage
stage "Stopping the proxy and the manager"
compose stop manager_proxy manager_app >/dev/null 2>&1 || fail "they do not stop: docker ps tells more"
done_stage
