#!/bin/bash
# test.sh lint | fast | integration | crash | e2e | bench | all. Makes what it needs: .venv from the lock file, the engine, the base image.
HERE=$(dirname "$0")
. "$HERE/common.sh"
. "$HERE/packages.sh"
. "$HERE/python.sh"

VENV=$ROOT/.venv
export PYTHONPATH="$ROOT/src:$ROOT/worker" PATH="$VENV/bin:$PATH"

make_venv() {
    local wanted
    wanted=$(sha256sum <"$ROOT/requirements-dev.lock")
    [ "$(cat "$VENV/lock" 2>/dev/null)" = "$wanted" ] && return
    ensure_python
    stage "Making .venv from requirements-dev.lock"
    fill_venv "$VENV" "$ROOT/requirements-dev.lock"
    echo "$wanted" >"$VENV/lock"
    done_stage
}

make_engine() {
    local program
    command -v ssh >/dev/null || install_packages openssh-client
    # For the commands of the README, which the tests type.
    for program in curl jq; do command -v "$program" >/dev/null || install_packages "$program"; done
    "$HERE/engine.sh"
    "$HERE/base-image.sh"
}

# Every linter runs, whatever the one before it said.
lint() {
    local failed=0
    check ruff check . || failed=1
    check ruff format --check . || failed=1
    check mypy || failed=1
    check lint-imports || failed=1
    check ansible-lint --offline --strict -q playbooks || failed=1
    check shellcheck scripts/*.sh manager_proxy/*.sh .ci/run || failed=1
    check hadolint --config .hadolint.yaml ./*/Dockerfile || failed=1
    return $failed
}

check() {
    stage "lint: $1${2:+ $2}"
    if "$@" >"$VENV/lint.log" 2>&1 </dev/null; then
        done_stage
    else
        done_stage "FAILED"
        cat "$VENV/lint.log"
        return 1
    fi
}

# Only the layers that exist.
run_tests() {
    local layer place='' status=0 found=() options=()
    # Only the fast layers share nothing, so only they may run side by side.
    if [ "$1" = --parallel ]; then
        options=(-n 2)
        # Their databases sync each commit: in memory that costs nothing.
        [ ! -w /dev/shm ] || place=$(mktemp -d /dev/shm/orion-tests.XXXXXX)
        [ -z "$place" ] || options+=(--basetemp="$place/pytest")
        shift
    fi
    for layer in "$@"; do
        if compgen -G "tests/$layer/test_*.py" >/dev/null; then found+=("tests/$layer"); fi
    done
    [ ${#found[@]} -gt 0 ] || fail "no tests in: $*"
    python -m pytest -q "${options[@]}" "${found[@]}" </dev/null || status=$?
    [ -z "$place" ] || rm -rf "$place"
    return $status
}

everything() {
    local failed=0
    lint || failed=1
    make_engine
    [ $failed -eq 0 ] || echo "lint FAILED, see above; the tests run all the same"
    ORION_SCHEDULES=1000 run_tests unit property simulation integration crash e2e || failed=1
    return $failed
}

# Growth is measured without engine and load generator.
make_bench() {
    if [ "$*" = growth ]; then return; fi
    make_engine
    command -v wrk >/dev/null || install_packages wrk
}

# A part of the tests that is a program of its own; its module and its arguments.
run_program() {
    PYTHONPATH=$PYTHONPATH:$ROOT/tests:$ROOT python -m "$@"
}

cd "$ROOT"
make_venv
case ${1:-all} in
simulate) run_program simulation.runner "${@:2}" ;;
mutants) run_program simulation.mutants.run "${@:2}" ;;
bench)
    make_bench "${@:2}"
    run_program bench "${@:2}"
    ;;
lint) lint ;;
fast) run_tests --parallel unit property simulation ;;
crash) run_tests crash ;;
integration | e2e)
    make_engine
    run_tests "$1"
    ;;
all) everything ;;
*) fail "usage: test.sh lint | fast | integration | crash | e2e | simulate | mutants | bench | all" ;;
esac
