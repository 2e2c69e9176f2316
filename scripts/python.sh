# shellcheck shell=bash
# Make virtual environments from the lock files. Source it after common.sh and packages.sh.

# Print the path of a Python from 3.11 on that can make a virtual environment. Debian's own is tried first, because apt can
# install what it lacks.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            type -P "$candidate"
            return
        fi
    done
    return 1
}

ensure_python() {
    find_python >/dev/null && return
    install_packages python3-venv
    find_python >/dev/null && return
    if apt_has python3.11-venv; then install_packages python3.11-venv; fi
    find_python >/dev/null || fail "Python 3.11 or newer is needed: install it, then run this again"
}

# fill_venv DIRECTORY LOCKFILE: make an environment with exactly the packages of the lock file, verified by their hashes.
fill_venv() {
    "$(find_python)" -m venv --clear "$1"
    # An older pip trusts only its own certificate authorities.
    PIP_CERT=${PIP_CERT:-$(first_of /etc/ssl/certs/ca-certificates.crt)} PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$1/bin/pip" install --no-input --require-hashes --only-binary :all: --requirement "$2" >"$1/pip.log" 2>&1 || {
        tail -n 15 "$1/pip.log" >&2
        fail "pip could not install what $2 lists"
    }
}

first_of() { if [ -e "$1" ]; then echo "$1"; fi; }
