"""`orion config-ssh`, and how the machine's own ssh reads its files (ssh -G)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from support.own_sshd import OwnSshd, needs_sshd
from support.scripted_platform import HOST_KEY, ScriptedPlatform, page, rental
from websockets.asyncio.server import serve

from orion.login import Login
from orion.ssh_client import hosts

THEIRS = b"# mine\r\nHost *\n  User somebody\n  ServerAliveInterval 60\n\nHost work\n  HostName 192.0.2.1"
"""A user's configuration with a line end of another system, and none at its end."""
AUTHORITY = f"@cert-authority *.orion {HOST_KEY}"


class RenterMachine:
    """The home of a user with a login, and this machine's ssh."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.python = sys.executable
        self.platform = ScriptedPlatform()
        self.rentals(rental())
        self.platform.answer("GET", "/api/ssh-authority", {"public_key": HOST_KEY, "known_hosts": AUTHORITY})
        self.config = home / ".ssh/config"
        token = home / "token"
        token.write_text("orion_client_t1_secret")
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "ORION_URL": self.platform.url,
            "ORION_TOKEN_FILE": str(token),
        }

    def has_key_of(self, rental_id: str) -> Path:
        """Make a key and record it for the rental, as `orion rent` does."""
        key = self.home / ".ssh/of rental"
        key.touch(mode=0o600)
        place = Path(self.environment.get("XDG_CONFIG_HOME", self.home / ".config")) / "orion"
        place.mkdir(parents=True, exist_ok=True)
        (place / "keys.json").write_text(json.dumps({rental_id: str(key)}))
        return key

    def rentals(self, *found: dict[str, Any]) -> None:
        """Answer requests for all rentals with these, and for own ones with those of ada, the owner of the login."""
        own = [one for one in found if one["owner"] == "ada"]
        self.platform.answer("GET", "/api/rentals", page(*found))
        self.platform.answer("GET", "/api/rentals?mine=true", page(*own))

    def orion(self, *arguments: str, status: int = 0) -> str:
        done = self._run([self.python, "-P", "-m", "orion.cli", *arguments])
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def asks(self, host: str) -> dict[str, str]:
        """Return the options that ssh would use for the host."""
        done = self.run_ssh("-G", host)
        assert done.returncode == 0, done.stderr
        lines = (line.partition(" ") for line in done.stdout.splitlines())
        options: dict[str, str] = {}
        for name, _, value in lines:
            options.setdefault(name, value)
        return options

    def run_ssh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run(["ssh", "-F", str(self.config), *arguments])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[RenterMachine]:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    made = RenterMachine(tmp_path)
    made.config.write_bytes(THEIRS)
    made.config.chmod(0o644)
    yield made
    made.platform.stop()


def test_plain_ssh_reaches_a_rental_by_its_name_or_id_with_every_host_verified(machine: RenterMachine) -> None:
    machine.orion("config-ssh")
    for host in ("box.orion", "abcdefgh23.orion"):
        asked = machine.asks(host)
        assert asked["user"] == "r-abcdefgh23"
        assert asked["hostkeyalias"] == "abcdefgh23.orion"
        assert asked["stricthostkeychecking"] == "true"
        assert asked["proxycommand"].endswith("-m orion.connect abcdefgh23")
        known = machine.home / ".config/orion/ssh/known_hosts"
        assert asked["userknownhostsfile"] == str(known)
        assert known.read_text() == f"{AUTHORITY}\n"


def test_the_earlier_configuration_still_applies_to_all_other_hosts(machine: RenterMachine) -> None:
    before = [machine.asks(host) for host in ("work", "elsewhere.example", "orion")]
    machine.orion("config-ssh")
    assert [machine.asks(host) for host in ("work", "elsewhere.example", "orion")] == before


def test_config_ssh_can_be_repeated_and_undone_without_a_trace(machine: RenterMachine) -> None:
    machine.orion("config-ssh")
    once = machine.config.read_bytes()
    assert once.endswith(THEIRS)
    assert once.count(b"Include") == 1
    machine.orion("config-ssh")
    assert machine.config.read_bytes() == once
    machine.orion("config-ssh", "--remove")
    assert machine.config.read_bytes() == THEIRS
    assert machine.config.stat().st_mode & 0o777 == 0o644
    assert not (machine.home / ".config/orion/ssh").exists()
    machine.orion("config-ssh", "--remove")
    assert machine.config.read_bytes() == THEIRS


def test_a_dry_run_shows_what_would_change_and_changes_nothing(machine: RenterMachine) -> None:
    shown = machine.orion("config-ssh", "--dry-run")
    assert "+Include" in shown
    assert machine.config.read_bytes() == THEIRS
    assert not (machine.home / ".config/orion/ssh").exists()
    assert machine.platform.calls == []


def test_a_link_stays_a_link_and_a_missing_file_is_made_readable_by_its_owner_only(machine: RenterMachine) -> None:
    kept = machine.home / "dotfiles"
    machine.config.rename(kept)
    machine.config.symlink_to(kept)
    machine.orion("config-ssh")
    assert machine.config.is_symlink()
    assert kept.read_bytes().endswith(THEIRS)
    machine.config.unlink()
    machine.orion("config-ssh")
    assert machine.config.stat().st_mode & 0o777 == 0o600
    assert machine.asks("box.orion")["user"] == "r-abcdefgh23"


def test_a_rental_that_was_made_elsewhere_is_looked_up_when_ssh_needs_it(machine: RenterMachine) -> None:
    machine.has_key_of("abcdefgh23")
    machine.orion("config-ssh")
    machine.rentals(rental(), rental(id="another234", name="web", username="r-another234"))
    machine.platform.calls.clear()
    assert machine.asks("box.orion")["user"] == "r-abcdefgh23"
    assert machine.platform.calls == [], "a known rental needs no request"
    assert machine.asks("web.orion")["user"] == "r-another234"


def test_an_unknown_name_ends_ssh_with_a_message(machine: RenterMachine) -> None:
    machine.orion("config-ssh")
    asked = machine.asks("nothing.orion")
    assert asked["proxycommand"].endswith("orion.connect --unknown")
    assert asked["stricthostkeychecking"] == "true"
    done = machine._run(["ssh", "-F", str(machine.config), "-o", "BatchMode=yes", "nothing.orion"])
    assert "no living rental of this name" in done.stderr
    assert done.returncode == 255


def test_a_name_that_two_other_owners_use_is_configured_for_neither(machine: RenterMachine) -> None:
    machine.rentals(rental(owner="carol"), rental(id="another234", username="r-another234", owner="bob"))
    machine.orion("config-ssh")
    assert "--unknown" in machine.asks("box.orion")["proxycommand"]
    assert machine.asks("another234.orion")["user"] == "r-another234"


def test_an_admins_own_rental_goes_before_others_of_its_name(machine: RenterMachine) -> None:
    """`orion show` and `orion ssh` choose the same rental."""
    machine.rentals(rental(id="another234", username="r-another234", owner="bob"), rental(owner="ada"))
    machine.has_key_of("abcdefgh23")
    machine.orion("config-ssh")
    asked = machine.asks("box.orion")
    assert asked["user"] == "r-abcdefgh23"
    assert asked["hostkeyalias"] == "abcdefgh23.orion"
    assert machine.asks("another234.orion")["user"] == "r-another234"


def test_an_own_rental_is_configured_however_many_others_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "MAX_LISTED", 2)
    platform = ScriptedPlatform()
    platform.answer("GET", "/api/rentals", page(rental(id="another234", owner="bob"), following="another234"))
    platform.answer("GET", "/api/rentals?mine=true", page(rental()))
    own, others = hosts.own_and_others(Login(platform.url, "orion_client_t1_secret", None))
    platform.stop()
    assert [one["id"] for one in own] == ["abcdefgh23"]
    assert {one["id"] for one in others} == {"another234"}


def test_an_own_rental_lends_its_certificate_to_no_other_of_its_name(machine: RenterMachine) -> None:
    """`orion ssh` with the other rental's id uses the host name that both rentals have."""
    machine.rentals(rental(id="another234", username="r-another234", owner="bob"), rental(owner="ada"))
    machine.orion("config-ssh")
    machine.platform.calls.clear()
    assert "certificatefile" not in machine.asks("r-another234@box.orion")
    assert machine.platform.calls == []


ODD = 'it\'s a "b"  100%h%% $HOME $(touch pwned) #1 a\\b [x]*? ä;b&c|d'
"""A path with characters that are special to a shell, to ssh or to glob(7)."""


def read(path: str) -> str:
    """Return a path that ssh -G printed, with each % once instead of twice."""
    return re.sub("%+", "%", path)


@pytest.mark.parametrize("where", ["HOME", "XDG_CONFIG_HOME", "program"])
def test_ssh_reads_a_configuration_whose_path_has_any_characters(tmp_path: Path, where: str) -> None:
    place = tmp_path / ODD
    (place / ".ssh").mkdir(parents=True)
    home = place if where == "HOME" else tmp_path
    (home / ".ssh").mkdir(exist_ok=True)
    machine = RenterMachine(home)
    try:
        machine.config.write_bytes(THEIRS)
        if where == "XDG_CONFIG_HOME":
            machine.environment["XDG_CONFIG_HOME"] = str(place)
        if where == "program":
            machine.python = str(place / "python")
            Path(machine.python).symlink_to(sys.executable)
            machine.environment["PYTHONHOME"] = sys.base_prefix
        key = machine.has_key_of("abcdefgh23")
        before = machine.asks("work")
        machine.orion("config-ssh")
        assert machine.asks("work") == before
        asked = machine.asks("box.orion")
        assert asked["user"] == "r-abcdefgh23"
        assert read(asked["identityfile"]) == read(str(key))
        known = Path(machine.environment.get("XDG_CONFIG_HOME", home / ".config")) / "orion/ssh/known_hosts"
        assert read(asked["userknownhostsfile"]) == read(str(known))
        machine.platform.calls.clear()
        done = machine.run_ssh("-o", "BatchMode=yes", "box.orion")
        assert machine.platform.calls[0].path == "/api/rentals/abcdefgh23/ssh", done.stderr
        machine.rentals(rental(), rental(id="another234", name="web", username="r-another234"))
        assert machine.asks("web.orion")["user"] == "r-another234", "an unknown rental is requested"
        machine.orion("config-ssh", "--remove")
        assert machine.config.read_bytes() == THEIRS
        assert not list(tmp_path.rglob("pwned"))
    finally:
        machine.platform.stop()


@pytest.mark.parametrize("place", ["new\nline", "${HOME}"])
def test_a_path_that_cannot_be_written_is_refused_and_nothing_changes(machine: RenterMachine, place: str) -> None:
    machine.environment["XDG_CONFIG_HOME"] = str(machine.home / place)
    assert "XDG_CONFIG_HOME" in machine.orion("config-ssh", status=2)
    assert machine.config.read_bytes() == THEIRS


def test_a_configuration_that_ssh_refuses_is_never_installed(machine: RenterMachine) -> None:
    """Keep the former file: a configuration that ssh refuses would break every ssh of this user."""
    machine.orion("config-ssh")
    before = (machine.home / ".config/orion/ssh/config").read_text()
    strict = machine.home / "bin/ssh"
    strict.parent.mkdir()
    strict.write_text("#!/bin/sh\necho 'line 3: invalid quotes' >&2\nexit 255\n")
    strict.chmod(0o755)
    machine.environment["PATH"] = f"{strict.parent}:{machine.environment['PATH']}"
    machine.rentals(rental(), rental(id="another234", name="web", username="r-another234"))
    assert "invalid quotes" in machine.orion("config-ssh", status=1)
    assert (machine.home / ".config/orion/ssh/config").read_text() == before
    assert not (machine.home / ".config/orion/ssh/candidate").exists()


def test_another_user_s_home_is_not_changed(machine: RenterMachine) -> None:
    """Run as with sudo: files of root in a user's home would break every ssh of that user."""
    if os.geteuid():
        pytest.skip("Only root can make a file that is another user's.")
    os.chown(machine.home, 12345, 12345)
    assert "another user's home" in machine.orion("config-ssh", status=1)
    assert machine.config.read_bytes() == THEIRS


def test_one_level_of_inclusion_is_enough_for_a_rental_that_is_known(machine: RenterMachine) -> None:
    """Some tools do not follow an Include of an included file, and others follow none and are given this file."""
    machine.has_key_of("abcdefgh23")
    machine.orion("config-ssh")
    (machine.home / ".config/orion/ssh/rentals").unlink()
    assert machine.asks("box.orion")["user"] == "r-abcdefgh23"


PARAMIKO_READS = """
import json, sys, paramiko
print(json.dumps(dict(paramiko.SSHConfig.from_path(sys.argv[1]).lookup(sys.argv[2]))))
"""


def read_by_paramiko(machine: RenterMachine, host: str) -> dict[str, Any]:
    """Return the options that paramiko would use for the host, from the one file that it is given."""
    file = str(machine.home / ".config/orion/ssh/config")
    done = machine._run([sys.executable, "-c", PARAMIKO_READS, file, host])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_paramiko_finds_a_rental_in_the_given_configuration(machine: RenterMachine) -> None:
    """paramiko does not follow an Include, but runs the command of a Match."""
    key = machine.has_key_of("abcdefgh23")
    machine.orion("config-ssh")
    machine.platform.calls.clear()
    for host in ("box.orion", "abcdefgh23.orion"):
        found = read_by_paramiko(machine, host)
        assert (found["hostname"], found["user"]) == (host, "r-abcdefgh23")
        assert found["identityfile"] == [str(key)]
        assert found["proxycommand"] == machine.asks(host)["proxycommand"]
        assert shlex.split(found["proxycommand"])[-1] == "abcdefgh23"
    assert machine.platform.calls == [], "a known rental needs no request"
    machine.rentals(rental(), rental(id="another234", name="web", username="r-another234"))
    unknown = read_by_paramiko(machine, "web.orion")
    assert "user" not in unknown
    assert unknown["proxycommand"].endswith("orion.connect --unknown")
    assert read_by_paramiko(machine, "web.orion")["user"] == "r-another234", "it was learned, and is found from now on"


@needs_sshd
async def test_paramiko_logs_in_with_the_configuration_and_verifies_the_host(
    machine: RenterMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko does not know host certificates, so it verifies the worker's key, which the platform shows."""
    worker = OwnSshd.make(tmp_path, ("abcdefgh23",))
    machine.has_key_of("abcdefgh23").write_bytes(worker.key.read_bytes())
    machine.orion("config-ssh")
    found = read_by_paramiko(machine, "box.orion")

    def log_in(host_key: str) -> str:
        kind, _, text = host_key.partition(" ")
        with (
            paramiko.ProxyCommand(found["proxycommand"]) as way,
            paramiko.SSHClient() as client,
        ):
            client.get_host_keys().add("box.orion", kind, paramiko.Ed25519Key(data=b64decode(text)))
            client.connect(
                *(found["hostname"],), username=worker.account, key_filename=found["identityfile"], sock=way,
                allow_agent=False, look_for_keys=False, timeout=60, banner_timeout=60, auth_timeout=60,
            )  # fmt: skip
            _stdin, stdout, _stderr = client.exec_command("id -un", timeout=60)
            return stdout.read().decode()

    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    async with serve(worker.serve, "127.0.0.1", 0, compression=None, close_timeout=0.2) as server:
        monkeypatch.setenv("ORION_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert await asyncio.to_thread(log_in, worker.public_host_key) == f"{worker.account}\n"
        with pytest.raises(paramiko.BadHostKeyException):
            await asyncio.to_thread(log_in, HOST_KEY)


def test_a_rental_without_a_key_here_is_opened_by_one_certificate_an_epoch(
    machine: RenterMachine,
) -> None:
    machine.platform.answer("GET", "/api/rentals/abcdefgh23", rental(epoch=1))
    certificate = {"certificate": "ssh-ed25519-cert-v01@openssh.com AAAA", "expires_at": "2130-01-01T00:00:00Z"}
    machine.platform.answer("POST", "/api/rentals/abcdefgh23/certificate", certificate)
    machine.orion("config-ssh")
    place = machine.home / ".config/orion"

    (place / "abcdefgh23-cert.pub").write_text("ssh-ed25519-cert-v01@openssh.com AAAA\n")  # as `orion ssh` stores it

    def times_asked() -> int:
        return sum(call.method == "POST" for call in machine.platform.calls)

    for epoch, times in ((1, 1), (1, 1), (2, 2)):
        machine.platform.answer("GET", "/api/rentals/abcdefgh23", rental(epoch=epoch))
        asked = machine.asks("box.orion")
        assert asked["identityfile"] == str(place / "id_ed25519")
        assert asked["identitiesonly"] == "yes", "the keys of an agent do not use up all attempts"
        assert asked["certificatefile"] == str(place / "abcdefgh23-cert.pub")
        assert (place / "abcdefgh23-cert.pub").read_text().startswith("ssh-ed25519-cert-v01@openssh.com AAAA ")
        assert times_asked() == times


def test_rentals_share_no_connection_and_get_no_agent_unless_the_user_requests_them(machine: RenterMachine) -> None:
    machine.config.write_bytes(
        b"Host *\n ControlMaster auto\n ControlPath ~/.ssh/%C\n ForwardAgent yes\n ConnectTimeout 5\n"
    )
    machine.has_key_of("abcdefgh23")
    machine.orion("config-ssh")
    asked = machine.asks("box.orion")
    assert asked["controlmaster"] == "false"
    assert "controlpath" not in asked
    assert asked["forwardagent"] == "no"
    assert int(asked["connecttimeout"]) > 100, "longer than the relay waits for a rental"
    assert "LC_*" in asked["sendenv"]


def test_a_shell_that_cannot_run_commands_is_reported(machine: RenterMachine) -> None:
    machine.environment["SHELL"] = "/usr/sbin/nologin"
    assert "SHELL=/bin/sh ssh" in machine.orion("config-ssh")


@pytest.mark.parametrize("host", ["$(touch pwned).orion", "x;touch pwned.orion", "'`touch pwned`'.orion"])
def test_a_hosts_name_never_becomes_a_command(machine: RenterMachine, host: str) -> None:
    machine.orion("config-ssh")
    for options in (["-G"], ["-o", "BatchMode=yes"]):
        machine._run(["ssh", "-F", str(machine.config), *options, "--", host])
    assert not (machine.home / "pwned").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "box\nHost *\n ProxyCommand touch pwned"},
        {"name": "*"},
        {"username": "root"},
        {"id": "x y"},
        {"id": "../x"},
    ],
)
def test_no_text_of_the_platform_becomes_a_line_of_the_configuration(
    machine: RenterMachine, change: dict[str, Any]
) -> None:
    machine.rentals(rental(**change))
    machine.orion("config-ssh", status=1)
    assert machine.config.read_bytes() == THEIRS
    assert not (machine.home / ".config/orion/ssh/rentals").exists()


def test_rent_and_release_update_the_configuration(machine: RenterMachine) -> None:
    machine.orion("config-ssh")
    machine.rentals()
    ended = rental(state="released")
    machine.platform.answer("GET", "/api/rentals/box", ended)
    machine.platform.answer("DELETE", "/api/rentals/abcdefgh23", ended)
    machine.orion("release", "box", "--yes")
    assert "--unknown" in machine.asks("box.orion")["proxycommand"]


def test_the_relay_starts_without_the_modules_of_the_other_commands() -> None:
    """ssh starts `orion connect`, by the program of all other commands, for every session."""
    heavy = "{'typer', 'rich', 'pydantic', 'httpx', 'websockets', 'asyncio', 'ssl', 'http.client'} & set(sys.modules)"
    program = (
        "import sys\nsys.argv = ['orion', 'connect', '--unknown']\nfrom orion.cli import main\n"
        f"try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\nassert not {heavy}, {heavy}"
    )
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no living rental of this name" in done.stderr
