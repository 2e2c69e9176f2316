# Orion-Sec. `make up` is all that a bare Debian or Ubuntu machine needs.
SHELL := /bin/bash
ORION_PY ?= $(shell scripts/command.sh python)
UV ?= uv

.PHONY: up down clean token demo logs status test test-fast test-integration test-e2e chaos simulate mutants bench bench-failover \
	lint lock help

help:  ## what there is
	@grep -E '^[a-z0-9-]+: .*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 20

up:  ## install what is missing, build, start, wait until all workers are ready (WORKERS=N, ORION_SUBNET=10.77.0.0/16, ...)
	@scripts/up.sh

down:  ## stop everything and keep everything
	@scripts/down.sh

clean:  ## remove everything that up made, after asking (CONFIRM=yes answers)
	@scripts/clean.sh

token:  ## print the admin token
	@scripts/compose.sh exec -T manager_app cat /var/lib/orion/secrets/admin_token

demo:  ## rent, log in, kill the worker, watch the migration, log in again (FAST=1: all clocks at a tenth)
	@$(ORION_PY) scripts/demo.py

logs:  ## follow what the services say
	@scripts/compose.sh logs --follow --tail 100

status:  ## containers, workers and rentals
	@scripts/compose.sh ps
	@scripts/compose.sh exec -T manager_app orion status

test:  ## linters and all tests; makes .venv and the engine where they are missing
	@scripts/test.sh all

test-fast:  ## the tests that need neither engine nor network
	@scripts/test.sh fast

test-integration:  ## one part for real
	@scripts/test.sh integration

test-e2e:  ## the whole platform
	@scripts/test.sh e2e

# SECONDS is also a variable of bash, which does not export it.
chaos:  ## renters at work while everything is killed, paused, cut off, drained and taken away; a checker reads all (SECONDS=N; SEED=N replays)
	@scripts/test.sh chaos $(if $(SEED),--seed $(SEED)) --seconds $(or $(SECONDS),300) $(if $(KEEP),--keep $(KEEP))

simulate:  ## 10,000 histories of a platform on which everything goes wrong (SCHEDULES=N; SEED=N replays one and tells it)
	@scripts/test.sh simulate $(if $(SEED),--seed $(SEED)) --schedules $(or $(SCHEDULES),10000)

mutants:  ## break the code on purpose, one way after another: each must be noticed by a test
	@scripts/test.sh mutants

bench:  ## measure it against what it is made of, in under 20 minutes (ONLY=rent, burst, sessions, keystrokes, heartbeats, growth, watch or, by itself, strangers or snapshots); see docs/performance.md
	@scripts/test.sh bench $(ONLY)

bench-failover:  ## a worker is killed or cut off, the platform restarts: how long, and where the time goes, in about 30 minutes
	@scripts/test.sh bench failover

lint:  ## every linter and the type checker
	@scripts/test.sh lint

# A universal resolution: one lock file for every Python from 3.11 on.
LOCK = $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command 'make lock'
lock:  ## resolve pyproject.toml anew (needs uv)
	$(LOCK) --output-file requirements.lock
	$(LOCK) --extra manager --output-file requirements-manager.lock
	$(LOCK) --extra manager --group dev --output-file requirements-dev.lock
