#!/bin/bash
# Stop the platform and keep its containers, volumes and images. make up continues it.
. "$(dirname "$0")/common.sh"

# The workers stop first: meanwhile the manager parks their rentals, with a last snapshot of each. make up, or docker
# compose up after docker compose down, starts the rentals again on any workers.
load_settings
stage "Parking rentals and stopping the workers"
compose stop worker >/dev/null 2>&1 || fail "the workers did not stop: docker ps shows their state"
done_stage
stage "Stopping the proxy and the manager"
compose stop manager_proxy manager_app >/dev/null 2>&1 || fail "proxy and manager did not stop: docker ps shows their state"
done_stage
