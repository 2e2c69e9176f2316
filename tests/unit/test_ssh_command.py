"""The argument lists of ssh: each pins one host and checks its key."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from ansible_contract import KEY, OTHER_KEY

from orion.manager.ssh.options import worker_ssh
from orion.manager.ssh.port import Host
from orion.ssh_command import Pinned, pinned_authority_arguments, pinned_host_arguments, ssh_command

AUTHORITY = f"@cert-authority *.orion {KEY}"
CARELESS = (
    *("StrictHostKeyChecking=no", "UserKnownHostsFile=/tmp/any", "KnownHostsCommand=/bin/true"),
    *("HostKeyAlias=any", "UpdateHostKeys=yes"),
)
needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="it is for OpenSSH to say: runs where ssh is")


def settings(arguments: list[str]) -> dict[str, str]:
    """Return the settings that ssh itself derives from its arguments, by their names in ssh_config."""
    done = subprocess.run(["ssh", "-G", *arguments[1:]], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@needs_ssh
@pytest.mark.parametrize(
    "pinned", [pinned_host_arguments("w-one", (KEY,)), pinned_authority_arguments("w-one", AUTHORITY)]
)
def test_no_option_turns_off_the_check_of_the_host_key(pinned: Pinned) -> None:
    flags = [part for option in CARELESS for part in ("-o", option)]
    found = settings(ssh_command("192.0.2.7", pinned, CARELESS, ["-F", "none", *flags], ["id", "-oany"]))
    assert found["stricthostkeychecking"] == "true"
    assert found["hostkeyalias"] == "w-one"
    assert found["userknownhostsfile"] == "none"
    assert KEY.split()[1] in found["knownhostscommand"]


def test_a_destination_is_no_option() -> None:
    assert ssh_command("-oany", pinned_host_arguments("w-one", (KEY,)))[-2:] == ["--", "-oany"]


def test_of_several_host_keys_the_one_for_ed25519_is_pinned() -> None:
    arguments = pinned_host_arguments("w-one", ("ssh-rsa AAAA", KEY))
    assert f"KnownHostsCommand=/bin/echo w-one {' '.join(KEY.split()[:2])}" in arguments
    assert "HostKeyAlgorithms=rsa-sha2-512,rsa-sha2-256" in pinned_host_arguments("w-one", ("ssh-rsa AAAA",))


def test_no_connection_is_made_to_a_host_without_a_key() -> None:
    with pytest.raises(ValueError, match="no host key is known for w-one"):
        pinned_host_arguments("w-one", ())


@needs_ssh
def test_the_options_of_a_purpose_count_before_the_common_ones(tmp_path: Path) -> None:
    (tmp_path / "id_ed25519").touch()
    host = Host(worker_id="w-one", address="192.0.2.7", host_keys=(OTHER_KEY,), port=2222)
    found = settings(worker_ssh(host, tmp_path, ("ServerAliveInterval=5", "ControlMaster=yes")))
    assert (found["serveraliveinterval"], found["serveralivecountmax"]) == ("5", "2")
    assert (found["user"], found["hostname"], found["port"]) == ("root", "192.0.2.7", "2222")
    assert found["controlpath"].startswith(f"{tmp_path}/w-one-")
    assert found["identityfile"] == str(tmp_path / "id_ed25519")
    assert (found["batchmode"], found["forwardagent"], found["stricthostkeychecking"]) == ("yes", "no", "true")
