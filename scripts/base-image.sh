#!/bin/bash
# Provide the base of the three images, debian:trixie-slim. If the image is missing it is pulled, or built from Debian's
# archive where no registry can be reached. A built one contains the certificate authorities of this machine, so that apt
# and pip work in builds behind a company's own authority.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/packages.sh"

IMAGE=debian:trixie-slim
PULL_TIMEOUT_S=90

image_exists() { docker image inspect "$IMAGE" >/dev/null 2>&1; }

pull() { with_docker timeout "$PULL_TIMEOUT_S" "$(type -P docker)" pull --quiet "$IMAGE" >/dev/null 2>&1; }

make_image() {
    local missing=()
    command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
    install_packages "${missing[@]}"
    stage "No registry can be reached: building $IMAGE"
    work=$(mktemp -d /tmp/orion-base.XXXXXX)
    trap 'as_root rm -rf "$work"' EXIT
    fetch "$work/log" bootstrap || {
        tail -n 5 "$work/log" >&2
        fail "mmdebstrap could not build the base image: check that Debian's archive can be reached"
    }
    docker import --change 'CMD ["bash"]' - "$IMAGE" <"$work/base.tar" >/dev/null
    done_stage
}

# Build the image without documentation and translations, like the original.
bootstrap() {
    mkdir -p "$work/authorities"
    find /usr/local/share/ca-certificates -name '*.crt' -exec cp {} "$work/authorities" \; 2>/dev/null || true
    # shellcheck disable=SC2016 # mmdebstrap's hooks expand $1, which is the new root
    as_root mmdebstrap --variant=minbase --include=ca-certificates \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --customize-hook="cp '$work'/authorities/* \"\$1/usr/local/share/ca-certificates/\" 2>/dev/null || true" \
        --customize-hook='chroot "$1" update-ca-certificates' \
        trixie "$work/base.tar"
}

image_exists && exit 0
stage "Pulling $IMAGE"
if pull; then
    done_stage
else
    done_stage "(failed)"
    make_image
fi
