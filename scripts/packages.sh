# shellcheck shell=bash
# Debian and Ubuntu packages. To be sourced after common.sh.

apt_knows() {
    refresh_package_lists /dev/null
    command -v apt-cache >/dev/null && [ -n "$(apt-cache search --names-only "^$1\$" 2>/dev/null)" ]
}

install_packages() {
    [ $# -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        fail "missing: $*, and no apt-get here to install them: install them yourself, then run this again"
    need_root "installing $*"
    stage "Installing $*"
    local log
    log=$(mktemp /tmp/orion-apt.XXXXXX)
    refresh_package_lists "$log"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install --yes "$@" \
        >>"$log" 2>&1 </dev/null || fail "apt-get install $* failed: see $log"
    rm -f "$log"
    done_stage
}

# Lists of today are new enough; a bare machine has none.
refresh_package_lists() {
    command -v apt-get >/dev/null || return 0
    [ -z "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -mmin -1440 -print -quit 2>/dev/null)" ] || return 0
    need_root "apt-get update"
    as_root apt-get -o DPkg::Lock::Timeout=120 update >>"$1" 2>&1 </dev/null || true
}
