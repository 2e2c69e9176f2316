#!/bin/bash
# The `orion` command in a virtual environment of its own (Debian refuses pip outside one), with a link on the PATH.
#   command.sh install | remove | python
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/packages.sh"
. "$(dirname "$0")/python.sh"

if [ "$(id -u)" -eq 0 ]; then
    HOUSE=/opt/orion-cli
else
    HOUSE=${XDG_DATA_HOME:-$HOME/.local/share}/orion
fi
VENV=$HOUSE/venv

# What the command is made of: when this changes it is made anew.
fingerprint() {
    (
        cd "$ROOT"
        find_python
        find src/orion -name '*.py' -not -path 'src/orion/manager/*' -print0 | sort -z | xargs -0 sha256sum requirements.lock
    ) | sha256sum
}

install() {
    if [ -x "$VENV/bin/orion" ] && [ "$(cat "$VENV/fingerprint" 2>/dev/null)" = "$(fingerprint)" ]; then
        return
    fi
    mkdir -p "$HOUSE"
    fill_venv "$VENV" "$ROOT/requirements.lock"
    copy_package
    fingerprint >"$VENV/fingerprint"
}

# The package is plain Python: copying it needs no build tool from the network.
copy_package() {
    local packages
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    (cd "$ROOT/src" && tar -c --exclude=__pycache__ --exclude=orion/manager orion) | tar -x --no-same-owner -C "$packages"
    printf '#!%s\nimport sys\n\nfrom orion.cli import main\n\nsys.exit(main())\n' "$VENV/bin/python" >"$VENV/bin/orion"
    chmod +x "$VENV/bin/orion"
}

# Under sudo the PATH that counts is that of the user who called.
callers_path() {
    if [ "$(id -u)" -eq 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        sudo --user "$SUDO_USER" --login printenv PATH 2>/dev/null || echo "$PATH"
    else
        echo "$PATH"
    fi
}

on_path() { [[ ":$1:" == *":$2:"* ]]; }

link_places() {
    if [ "$(id -u)" -eq 0 ]; then
        printf '%s\n' /usr/local/bin /usr/bin
    else
        printf '%s\n' "$HOME/.local/bin" "$HOME/bin" /usr/local/bin
    fi
}

link() {
    local path place
    path=$(callers_path)
    while read -r place; do
        on_path "$path" "$place" || continue
        mkdir -p "$place" 2>/dev/null || true
        if [ -e "$place/orion" ] && [ "$(readlink -f "$place/orion")" != "$(readlink -f "$VENV/bin/orion")" ]; then
            echo "$place/orion is another program and stays: call $VENV/bin/orion"
            return
        fi
        if [ -w "$place" ]; then ln -sfn "$VENV/bin/orion" "$place/orion"; else as_root ln -sfn "$VENV/bin/orion" "$place/orion"; fi
        return
    done < <(link_places)
    echo "No directory for commands is on your PATH: call $VENV/bin/orion"
}

remove() {
    local place
    while read -r place; do
        if [ "$(readlink "$place/orion" 2>/dev/null)" = "$VENV/bin/orion" ]; then
            if [ -w "$place" ]; then rm -f "$place/orion"; else as_root rm -f "$place/orion"; fi
        fi
    done < <(link_places)
    rm -rf "$VENV"
    rmdir "$HOUSE" 2>/dev/null || true
}

case ${1:-} in
install)
    install
    link
    ;;
remove) remove ;;
python) echo "$VENV/bin/python" ;;
*) fail "usage: command.sh install | remove | python" ;;
esac
