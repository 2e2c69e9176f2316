# shellcheck shell=bash
# Install Debian and Ubuntu packages. Source it after common.sh.

apt_has() {
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
        fail "missing: $*, and there is no apt-get to install them: install them yourself, then run this again"
    need_root "installing $*"
    stage "Installing $*"
    local log
    log=$(mktemp /tmp/orion-apt.XXXXXX)
    fetch "$log" apt_install "$@" || {
        echo >&2
        { grep -E '^(E|Err|dpkg|sudo)[: ]' "$log" || tail -n 5 "$log"; } | tail -n 10 >&2
        fail "apt-get install $* failed three times, for the reasons above; its whole output: $log"
    }
    rm -f "$log"
    done_stage
}

# Install packages. After a failure complete an interrupted earlier install, and update the package lists: the versions
# in them may have been replaced in the archive.
apt_install() {
    lists_are_new || apt_update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install --yes "$@" || {
        as_root env DEBIAN_FRONTEND=noninteractive dpkg --configure --pending || true
        apt_update
        return 1
    }
}

# Succeed if the package lists are at most a day old. A bare machine has no lists.
lists_are_new() {
    [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -mmin -1440 -print -quit 2>/dev/null)" ]
}

# Update the package lists. A failure is ignored, because the old lists may suffice; if not, the install fails.
apt_update() { as_root apt-get -o DPkg::Lock::Timeout=120 update </dev/null || true; }
