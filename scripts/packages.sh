# shellcheck shell=bash
# Debian and Ubuntu packages. To be sourced after common.sh.

apt_knows() {
    command -v apt-cache >/dev/null || return 1
    lists_are_new || {
        need_root "apt-get update"
        apt_update >/dev/null 2>&1
    }
    [ -n "$(apt-cache search --names-only "^$1\$" 2>/dev/null)" ]
}

install_packages() {
    [ $# -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        fail "missing: $*, and no apt-get here to install them: install them yourself, then run this again"
    need_root "installing $*"
    stage "Installing $*"
    local log
    log=$(mktemp /tmp/orion-apt.XXXXXX)
    fetch "$log" apt_install "$@" || {
        echo >&2
        { grep -E '^(E|Err|dpkg|sudo)[: ]' "$log" || tail -n 5 "$log"; } | tail -n 10 >&2
        fail "apt-get install $* failed three times, for the reasons above; everything that it said: $log"
    }
    rm -f "$log"
    done_stage
}

# What the lists name may have been replaced since they were read, and an earlier install may have been interrupted.
apt_install() {
    lists_are_new || apt_update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install --yes "$@" || {
        as_root env DEBIAN_FRONTEND=noninteractive dpkg --configure --pending || true
        apt_update
        return 1
    }
}

# Lists of today are new enough; a bare machine has none.
lists_are_new() {
    [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -mmin -1440 -print -quit 2>/dev/null)" ]
}

# Without new lists the old ones may do: what they lack is said by the install.
apt_update() { as_root apt-get -o DPkg::Lock::Timeout=120 update </dev/null || true; }
