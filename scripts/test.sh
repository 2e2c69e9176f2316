#!/bin/bash
# Run linters, tests or measurements, and install what they need: .venv from the lock file, the engine, the base image.
#   test.sh lint | fast | manager | integration | crash | e2e | chaos | simulate | mutants | bench | all
HERE=$(dirname "$0")
. "$HERE/common.sh"
. "$HERE/packages.sh"
. "$HERE/python.sh"

VENV=$ROOT/.venv
RESULTS=$VENV/results
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

# need PROGRAM [PACKAGE]: install the package if the program is missing.
need() { command -v "$1" >/dev/null || install_packages "${2:-$1}"; }

make_engine() {
    need ssh openssh-client
    need rsync
    # The tests run the commands of the README, which use curl and jq.
    need curl
    need jq
    "$HERE/engine.sh"
    "$HERE/base-image.sh"
}

# Install a browser for the browser terminal, and tmux, whose screen the tests compare with it.
make_browser() {
    need chromium
    need tmux
}

# Run every linter, also after one has failed.
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

# run_tests --alone | --spread | --by-file LAYER...: run the tests of these layers, as far as the layers exist.
run_tests() {
    local layer place='' status=0 found=() options=()
    case $1 in
    --alone) ;;
    # These tests share nothing with each other.
    --spread) options=(-n 2) ;;
    # Each process has its own containers, networks and ports. The tests of one file run in one process, and so do all
    # attacks (tests/conftest.py). Three processes fit on two cores, because most tests wait most of the time.
    --by-file) options=(-n 3 --dist loadfile --no-loadscope-reorder) ;;
    esac
    # The tests' databases sync each commit, which costs nothing in memory. Some tests run programs that they have written,
    # so the file system must allow that.
    if [ "$1" != --alone ] && [ -w /dev/shm ] && ! grep -q ' /dev/shm .*noexec' /proc/mounts; then
        place=$(mktemp -d /dev/shm/orion-tests.XXXXXX)
        options+=(--basetemp="$place/pytest")
    fi
    shift
    for layer in "$@"; do
        if compgen -G "tests/$layer/test_*.py" >/dev/null; then found+=("tests/$layer"); fi
    done
    [ ${#found[@]} -gt 0 ] || fail "there are no tests in: $*"
    python -m pytest -q --junitxml="$RESULTS/${found[0]##*/}.xml" "${options[@]}" "${found[@]}" </dev/null || status=$?
    [ -z "$place" ] || rm -rf "$place"
    return $status
}

# Build the three images under names of this checkout. They are kept, so that later builds of the tests use the cache.
build_images() {
    local checkout service
    checkout=$(printf %s "$ROOT" | sha256sum | cut -c 1-6)
    : >"$VENV/images.log"
    for service in worker proxy manager; do
        fetch "$VENV/images.log" \
            docker build --quiet --tag "orion-$service-test:$checkout" --file "$(dockerfile_of $service)" . || return
    done
}

# images_or_fail COMMAND...: run the command, and fail with the log of the builds if it fails.
images_or_fail() {
    "$@" || {
        cat "$VENV/images.log"
        fail "the images cannot be built"
    }
}

dockerfile_of() {
    case $1 in
    worker) echo worker/Dockerfile ;;
    proxy) echo manager_proxy/Dockerfile ;;
    manager) echo manager_app/Dockerfile ;;
    esac
}

# Run linters and all tests, also after one part has failed. The images are built while the first tests run, which need none.
run_all() {
    local failed=0 building
    lint || failed=1
    make_engine
    make_browser
    need openssl
    need faketime
    build_images &
    building=$!
    [ $failed -eq 0 ] || echo "lint FAILED, see above; the tests run nevertheless"
    ORION_SCHEDULES=1000 run_tests --spread unit property manager simulation || failed=1
    images_or_fail wait "$building"
    run_tests --by-file integration crash || failed=1
    run_tests --alone e2e || failed=1
    run_tests --alone chaos || failed=1
    summary
    return $failed
}

# Print one summary line of all runs of pytest, in pytest's format.
summary() {
    cat "$RESULTS"/*.xml | grep -o '<testsuite [^>]*>' | awk -F'"' -v seconds="$SECONDS" '
        { for (i = 1; i < NF; i += 2) if (match($i, / (tests|errors|failures|skipped)=$/)) count[$i] += $(i + 1) }
        END {
            failed = count[" failures="]; errors = count[" errors="]; skipped = count[" skipped="]
            if (failed) printf "%d failed, ", failed
            if (errors) printf "%d errors, ", errors
            if (skipped) printf "%d skipped, ", skipped
            printf "%d passed in %.2fs\n", count[" tests="] - failed - errors - skipped, seconds
        }'
}

# Install what the measurements need. Growth and watch need neither the engine nor the load generator.
make_bench() {
    if [ "$*" = growth ] || [ "$*" = watch ]; then return; fi
    make_engine
    need wrk
}

# run_program MODULE ARGUMENTS...: run a part of the tests that is a program of its own.
run_program() {
    PYTHONPATH=$PYTHONPATH:$ROOT/tests:$ROOT python -m "$@"
}

cd "$ROOT"
make_venv
rm -rf "$RESULTS"
case ${1:-all} in
simulate) run_program simulation.runner "${@:2}" ;;
mutants) run_program simulation.mutants.run "${@:2}" ;;
chaos)
    make_engine
    run_program chaos.runner "${@:2}"
    ;;
bench)
    make_bench "${@:2}"
    run_program bench "${@:2}"
    ;;
lint) lint ;;
fast)
    need openssl # for the tests of the proxy's certificate
    need rsync
    run_tests --spread unit property simulation
    ;;
crash)
    need faketime # for a manager whose clock is wrong
    run_tests --by-file crash
    ;;
manager) run_tests --spread manager ;;
integration)
    make_engine
    make_browser
    images_or_fail build_images
    run_tests --by-file integration
    ;;
e2e)
    make_engine
    make_browser
    run_tests --alone e2e
    ;;
all) run_all ;;
*) fail "usage: test.sh lint | fast | manager | integration | crash | e2e | chaos | simulate | mutants | bench | all" ;;
esac
