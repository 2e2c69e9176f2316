#!/bin/bash
# Stops the platform and keeps everything: containers, volumes, images. make up goes on where it was.
. "$(dirname "$0")/common.sh"

# The proxy and the manager first: a worker that stops says goodbye, and a manager that heard the goodbyes one after the
# other would move rentals from each worker to the next.
load_settings
stage "Stopping the proxy and the manager"
compose stop manager_proxy manager_app >/dev/null 2>&1 || fail "they do not stop: docker ps tells more"
done_stage
stage "Stopping the workers"
compose stop worker >/dev/null 2>&1 || fail "they do not stop: docker ps tells more"
done_stage
