# Orion-Sec. On a bare Debian or Ubuntu machine, `make up` installs what is missing and starts the platform.
SHELL := /bin/bash
ORION_PY ?= $(shell scripts/command.sh python)
UV ?= uv

.PHONY: up down clean token demo logs status test test-fast test-integration test-e2e chaos simulate mutants bench bench-failover \
	lint lock help

help:  ## list the targets
	@grep -E '^[a-z0-9-]+: .*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 20

up:  ## install what is missing, build, start, and wait until all workers are ready (WORKERS=N, ORION_SUBNET=10.77.0.0/16, ...)
	@scripts/up.sh

down:  ## stop the platform and keep its data
	@scripts/down.sh

clean:  ## remove everything that up made, after a confirmation (CONFIRM=yes gives it)
	@scripts/clean.sh

token:  ## print the admin token
	@scripts/compose.sh exec -T manager_app cat /var/lib/orion/secrets/admin_token

demo:  ## rent, log in, kill the worker, follow the takeover, log in again (FAST=1: all clocks at a tenth)
	@$(ORION_PY) scripts/demo.py

logs:  ## follow the logs of the services
	@scripts/compose.sh logs --follow --tail 100

status:  ## list containers, workers and rentals
	@scripts/compose.sh ps
	@scripts/compose.sh exec -T manager_app orion status

test:  ## run the linters and all tests; install .venv and the Docker engine where they are missing
	@scripts/test.sh all

test-fast:  ## run the tests that need neither Docker nor a network
	@scripts/test.sh fast

test-integration:  ## run the tests of single components in containers
	@scripts/test.sh integration

test-e2e:  ## run the tests of the whole platform
	@scripts/test.sh e2e

# SECONDS is also a variable of bash, which does not export it.
chaos:  ## kill, pause, disconnect and drain parts of a platform while renters work, and check every guarantee (SECONDS=N; SEED=N replays)
	@scripts/test.sh chaos $(if $(SEED),--seed $(SEED)) --seconds $(or $(SECONDS),300) $(if $(KEEP),--keep $(KEEP))

simulate:  ## simulate 10,000 histories of failures and check every guarantee (SCHEDULES=N; SEED=N replays one and prints it)
	@scripts/test.sh simulate $(if $(SEED),--seed $(SEED)) --schedules $(or $(SCHEDULES),10000)

mutants:  ## apply one deliberate defect after another: a test must fail for each
	@scripts/test.sh mutants

bench:  ## measure the platform against its components, in under 20 minutes (ONLY=rent, burst, sessions, keystrokes, heartbeats, growth, watch or, by itself, strangers or snapshots); see docs/performance.md
	@scripts/test.sh bench $(ONLY)

bench-failover:  ## measure takeovers and restarts of the platform and their steps, in about 30 minutes
	@scripts/test.sh bench failover

lint:  ## run every linter and the type checker
	@scripts/test.sh lint

# The resolution is universal: one lock file serves every Python from 3.11 on.
LOCK = $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command 'make lock'
lock:  ## resolve the dependencies of pyproject.toml anew (needs uv)
	$(LOCK) --output-file requirements.lock
	$(LOCK) --extra manager --output-file requirements-manager.lock
	$(LOCK) --extra manager --group dev --output-file requirements-dev.lock
