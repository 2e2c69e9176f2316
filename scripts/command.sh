#!/bin/bash
# Install or remove the `orion` command: a virtual environment of its own, because Debian refuses pip outside one, and a
# link in a directory of the PATH. `python` prints the path of that environment's Python.
#   command.sh install | remove | python
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/packages.sh"
. "$(dirname "$0")/python.sh"

if [ "$(id -u)" -eq 0 ]; then
    INSTALL_DIRECTORY=/opt/orion-cli
else
    INSTALL_DIRECTORY=${XDG_DATA_HOME:-$HOME/.local/share}/orion
fi
VENV=$INSTALL_DIRECTORY/venv

# Print a hash of everything that the command is made of. When the hash changes, the command is installed anew.
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
    mkdir -p "$INSTALL_DIRECTORY"
    fill_venv "$VENV" "$ROOT/requirements.lock"
    copy_package
    fingerprint >"$VENV/fingerprint"
}

# Copy the package into the environment. It is pure Python, so no build tool from the network is needed.
copy_package() {
    local packages
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    (cd "$ROOT/src" && tar -c --exclude=__pycache__ --exclude=orion/manager orion) | tar -x --no-same-owner -C "$packages"
    printf '#!%s\nimport sys\n\nfrom orion.cli import main\n\nsys.exit(main())\n' "$VENV/bin/python" >"$VENV/bin/orion"
    chmod +x "$VENV/bin/orion"
}

# Print the PATH of the user who called, also under sudo.
callers_path() {
    if [ "$(id -u)" -eq 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        sudo --user "$SUDO_USER" --login printenv PATH 2>/dev/null || echo "$PATH"
    else
        echo "$PATH"
    fi
}

on_path() { [[ ":$1:" == *":$2:"* ]]; }

link_directories() {
    if [ "$(id -u)" -eq 0 ]; then
        printf '%s\n' /usr/local/bin /usr/bin
    else
        printf '%s\n' "$HOME/.local/bin" "$HOME/bin" /usr/local/bin
    fi
}

link() {
    local path directory
    path=$(callers_path)
    while read -r directory; do
        on_path "$path" "$directory" || continue
        mkdir -p "$directory" 2>/dev/null || true
        if [ -e "$directory/orion" ] && [ "$(readlink -f "$directory/orion")" != "$(readlink -f "$VENV/bin/orion")" ]; then
            echo "$directory/orion is another program and was kept: run $VENV/bin/orion instead"
            return
        fi
        if [ -w "$directory" ]; then ln -sfn "$VENV/bin/orion" "$directory/orion"; else as_root ln -sfn "$VENV/bin/orion" "$directory/orion"; fi
        return
    done < <(link_directories)
    echo "Your PATH has no directory where orion could be linked: run $VENV/bin/orion instead"
}

remove() {
    local directory
    while read -r directory; do
        if [ "$(readlink "$directory/orion" 2>/dev/null)" = "$VENV/bin/orion" ]; then
            if [ -w "$directory" ]; then rm -f "$directory/orion"; else as_root rm -f "$directory/orion"; fi
        fi
    done < <(link_directories)
    rm -rf "$VENV"
    rmdir "$INSTALL_DIRECTORY" 2>/dev/null || true
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
