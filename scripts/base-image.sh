#!/bin/bash
# The base of the three images, debian:trixie-slim: here already, or pulled, or made from Debian's archive where no
# registry can be reached. A made one trusts what this machine trusts, so that apt and pip work in builds behind a
# company's own certificate authority.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/packages.sh"

IMAGE=debian:trixie-slim
PULL_TIMEOUT_S=90

present() { docker image inspect "$IMAGE" >/dev/null 2>&1; }

pull() { with_docker timeout "$PULL_TIMEOUT_S" "$(type -P docker)" pull --quiet "$IMAGE" >/dev/null 2>&1; }

make_image() {
    local missing=()
    command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
    install_packages "${missing[@]}"
    stage "No registry in reach: making $IMAGE from Debian's archive"
    work=$(mktemp -d /tmp/orion-base.XXXXXX)
    trap 'as_root rm -rf "$work"' EXIT
    fetch "$work/log" bootstrap || {
        tail -n 5 "$work/log" >&2
        fail "mmdebstrap could not make the base image: is Debian's archive in reach?"
    }
    docker import --change 'CMD ["bash"]' - "$IMAGE" <"$work/base.tar" >/dev/null
    done_stage
}

# Without documentation and translations, as the original.
bootstrap() {
    mkdir -p "$work/authorities"
    find /usr/local/share/ca-certificates -name '*.crt' -exec cp {} "$work/authorities" \; 2>/dev/null || true
    # shellcheck disable=SC2016 # $1 is the new root: mmdebstrap's hooks expand it
    as_root mmdebstrap --variant=minbase --include=ca-certificates \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --customize-hook="cp '$work'/authorities/* \"\$1/usr/local/share/ca-certificates/\" 2>/dev/null || true" \
        --customize-hook='chroot "$1" update-ca-certificates' \
        trixie "$work/base.tar"
}

present && exit 0
stage "Pulling $IMAGE"
if pull; then
    done_stage
else
    done_stage "(no)"
    make_image
fi
