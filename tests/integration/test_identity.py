"""Tests of identities on real workers: ssh verifies its worker, and a worker accepts a renter's certificate.

A renter's ssh knows only one line, the authority's. A worker knows of renters only a file of root.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rental_support import Rental, new_rental
from support.builders import AUTHORITIES, private_key
from support.patience import PATIENCE_S
from worker_support import SESSION_S, Worker, takes_connections, wait_until

from orion.manager.domain.host_certificates import LIFETIME_S, host_name
from orion.manager.ssh.authority import Authority

AUTHORITY = Authority(*AUTHORITIES, time.time)
FORMER = Authority(*AUTHORITIES, lambda: time.time() - LIFETIME_S - 60)
AHEAD = Authority(*AUTHORITIES, lambda: time.time() + 7200)
"""For whom a renter's clock is two hours late, and a worker's too."""
ANOTHER = Authority(private_key(), private_key(), time.time)


def certificate(on: Worker, *rentals: Rental, by: Authority = AUTHORITY) -> str:
    return by.host_certificate(by.next_serial(), "w-test", on.host_keys, [each.rental_id for each in rentals]).line


def activate(rental: Rental, line: str = "", **other: Any) -> Rental:
    line = line or certificate(rental.on, rental)
    variables = rental.variables | {"public_keys": [rental.key.public], "user_authority": AUTHORITY.of_users} | other
    status, report = rental.on.rental("run", **variables, host_certificate=line)
    assert status == 0, report
    return rental


def shows(on: Worker, line: str) -> None:
    """Make the worker's sshd show this certificate, as root of that worker can."""
    on.run("sh", "-c", f"echo '{line}' > /etc/ssh/orion_host_certificate.pub")
    before = on.run("stat", "-c", "%y", "/run/sshd.pid")
    on.run("sh", "-c", "kill -HUP $(cat /run/sshd.pid)")
    wait_until(lambda: on.run("stat", "-c", "%y", "/run/sshd.pid", check=False) not in {"", before}, "sshd begins anew")


def known_hosts(folder: Path) -> Path:
    file = folder / "known_hosts_of_a_renter"
    file.write_text(f"@cert-authority *.orion {AUTHORITY.of_hosts}\n")
    return file


def ssh_command(rental: Rental, to: Worker, *options: str) -> list[str]:
    """Return ssh as tools of a renter run it: only the authority is known, and checking is on."""
    return [
        "ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes",
        "-o", f"ConnectTimeout={PATIENCE_S}",
        "-o", f"UserKnownHostsFile={known_hosts(rental.key.file.parent)}", "-o", "GlobalKnownHostsFile=none",
        "-o", f"HostKeyAlias={host_name(rental.rental_id)}", "-o", "IdentitiesOnly=yes",
        *(options or ("-i", str(rental.key.file))), f"{rental.username}@{to.address}",
    ]  # fmt: skip


def ssh(rental: Rental, to: Worker, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*ssh_command(rental, to, *options), "id -un"]
    silence = subprocess.DEVNULL
    return subprocess.run(command, stdin=silence, capture_output=True, text=True, check=False, timeout=SESSION_S)


def is_refused(rental: Rental, to: Worker) -> bool:
    """Return whether ssh refuses the host before a log-in."""
    done = ssh(rental, to)
    assert done.returncode == 255, done.stdout
    assert "Permission denied" not in done.stderr, done.stderr
    return "Host key verification failed" in done.stderr


@pytest.fixture
def one(host: Worker, folder: Path) -> Iterator[Rental]:
    made = new_rental(host, folder)
    yield made
    host.rental("purge", **made.variables)


@pytest.fixture
def another(host: Worker, folder: Path) -> Iterator[Rental]:
    made = new_rental(host, folder)
    yield made
    host.rental("purge", **made.variables)


def test_ssh_verifies_a_worker_by_the_authority_only_and_without_a_prompt(one: Rental) -> None:
    activate(one)
    done = ssh(one, one.on)
    assert (done.stdout, done.stderr, done.returncode) == (f"{one.username}\n", "", 0)


def test_a_renter_with_a_late_clock_accepts_the_host_certificate(one: Rental) -> None:
    activate(one, certificate(one.on, one, by=AHEAD))
    done = ssh(one, one.on)
    assert (done.stdout, done.stderr) == (f"{one.username}\n", "")
    activate(one)
    shown = one.on.run("ssh-keygen", "-L", "-f", "/etc/ssh/orion_host_certificate.pub")
    ends = time.strptime(shown.partition(" to ")[2].split()[0], "%Y-%m-%dT%H:%M:%S")
    now = time.strptime(one.on.run("date", "+%Y-%m-%dT%H:%M:%S").strip(), "%Y-%m-%dT%H:%M:%S")
    assert time.mktime(ends) <= time.mktime(now) + LIFETIME_S, "a certificate from an earlier clock blocks no new one"


def test_after_a_migration_the_same_command_works_without_a_prompt(one: Rental, neighbour: Worker) -> None:
    activate(one)
    there = Rental(neighbour, one.key, one.rental_id, one.uid, epoch=2)
    activate(there)
    done = ssh(one, neighbour)
    assert (done.stdout, done.stderr) == (f"{one.username}\n", "")
    neighbour.rental("purge", **there.variables)


def test_a_new_certificate_ends_no_session_and_sshd_keeps_its_oom_score(one: Rental, another: Rental) -> None:
    activate(one)
    command = [*ssh_command(one, one.on), "echo in; read line; echo $line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        assert session.stdout.readline() == "in\n"
        activate(another, certificate(one.on, one, another))
        assert ssh(another, one.on).stdout == f"{another.username}\n"
        assert ssh(one, one.on).stdout == f"{one.username}\n"
        score = one.on.run("sh", "-c", "cat /proc/$(cat /run/sshd.pid)/oom_score_adj")
        assert score.strip() == "500", "its children begin with that score"
        out, _ = session.communicate("still here\n", timeout=SESSION_S)
    assert out == "still here\n"
    assert one.ssh("cat /proc/self/oom_score_adj").stdout.strip() in {"500", "1000"}, "and so do the renters' sessions"


def test_a_neighbour_cannot_impersonate_the_worker_of_a_rental(one: Rental, neighbour: Worker, folder: Path) -> None:
    """Try the neighbour's own certificate, none, and the worker's certificate, which is public."""
    activate(one)
    its_own = new_rental(neighbour, folder)
    activate(its_own)
    assert is_refused(one, neighbour)
    shows(neighbour, certificate(one.on, one))
    assert is_refused(one, neighbour)
    shows(neighbour, "")
    assert is_refused(one, neighbour)
    neighbour.rental("purge", **its_own.variables)


def test_a_former_worker_cannot_impersonate_the_new_one_after_its_certificate_has_expired(
    one: Rental, neighbour: Worker
) -> None:
    activate(one)
    shows(neighbour, certificate(neighbour, one, by=FORMER))
    assert is_refused(one, neighbour)


def test_a_certificate_of_another_authority_is_refused(one: Rental, neighbour: Worker) -> None:
    activate(one)
    shows(neighbour, certificate(neighbour, one, by=ANOTHER))
    assert is_refused(one, neighbour)


def test_a_later_rental_of_the_same_name_has_another_host_identity(one: Rental, another: Rental) -> None:
    """Use a name again: ssh verifies ids, which are never used again."""
    activate(one, certificate(one.on, one))
    status, report = one.on.rental("purge", **one.variables)
    assert status == 0, report
    activate(another, certificate(one.on, another))
    assert is_refused(one, one.on)
    assert ssh(another, one.on).returncode == 0


# Certificates of renters


def user_certificate(rental: Rental, folder: Path, of: Rental | None = None, **how: Any) -> tuple[str, ...]:
    """Return ssh's options for a certificate of a key that no worker knows. `of`: the rental that it is signed for."""
    named = of or rental
    key = new_rental(rental.on, folder).key
    by, epoch = how.get("by", AUTHORITY), how.get("epoch", named.epoch)
    source = how.get("source") or rental.on.run("cat", "/etc/orion/app_address").strip()
    line, _ = by.user_certificate(key.public, named.rental_id, epoch, "alice", source, how.get("lasts_s", 600))
    file = Path(f"{key.file}-cert.pub")
    file.write_text(f"{line}\n")
    return "-i", str(key.file), "-o", f"CertificateFile={file}"


def test_a_renter_s_certificate_opens_only_its_own_rental(one: Rental, another: Rental, folder: Path) -> None:
    activate(one)
    activate(another, certificate(one.on, one, another))
    assert ssh(one, one.on, *user_certificate(one, folder)).stdout == f"{one.username}\n"
    for wrong in (
        user_certificate(one, folder, another),
        user_certificate(one, folder, epoch=one.epoch + 1),
        user_certificate(one, folder, by=ANOTHER),
        user_certificate(one, folder, by=FORMER),
        user_certificate(one, folder, source="192.0.2.1"),
    ):
        done = ssh(one, one.on, *wrong)
        assert done.returncode == 255, wrong
        assert "Permission denied" in done.stderr
    as_root = ssh_command(one, one.on, *user_certificate(one, folder))
    as_root[-1] = f"root@{one.on.address}"
    done = subprocess.run([*as_root, "true"], capture_output=True, text=True, check=False, timeout=SESSION_S)
    assert "Permission denied" in done.stderr


def test_a_lock_and_a_higher_epoch_refuse_certificates_as_well_as_keys(one: Rental, folder: Path) -> None:
    activate(one)
    options = user_certificate(one, folder)
    one.on.rental("lock", rental_id=one.rental_id, epoch=one.epoch)
    assert "Permission denied" in ssh(one, one.on, *options).stderr
    one.on.rental("unlock", rental_id=one.rental_id, epoch=one.epoch)
    assert ssh(one, one.on, *options).returncode == 0
    one.epoch = 2
    activate(one)
    assert "Permission denied" in ssh(one, one.on, *options).stderr
    assert ssh(one, one.on, *user_certificate(one, folder)).returncode == 0


# Agents, languages and terminals of a renter's ssh


def test_only_the_renter_reaches_its_forwarded_agent(one: Rental, another: Rental) -> None:
    """Forward an agent, which `git clone git@...` needs. A roommate must reach neither the socket nor its folder."""
    activate(one)
    activate(another, certificate(one.on, one, another))
    with agent_with(one.key.file) as socket:
        ask = "ssh-add -L; echo $SSH_AUTH_SOCK; echo waiting; read line"
        forwarding = [*ssh_command(one, one.on)[:-1], "-A", f"{one.username}@{one.on.address}", ask]
        environment = os.environ | {"SSH_AUTH_SOCK": socket}
        with subprocess.Popen(
            forwarding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as it:
            assert it.stdout is not None
            assert one.key.public in it.stdout.readline()
            there = it.stdout.readline().strip()
            assert it.stdout.readline() == "waiting\n"
            stolen = another.ssh(f"SSH_AUTH_SOCK={there} ssh-add -L")
            assert stolen.returncode == 2, stolen.stdout
            it.communicate("\n", timeout=SESSION_S)
        without = subprocess.run(
            [*ssh_command(one, one.on), "ssh-add -L"], env=environment, capture_output=True, text=True, check=False
        )
        assert without.returncode == 2, "there is no agent without a request"


def test_a_worker_knows_the_locales_colours_and_terminals_of_renters_machines(one: Rental) -> None:
    activate(one)
    environment = os.environ | {"LC_ALL": "fr_FR.UTF-8", "COLORTERM": "truecolor", "ODD": "x"}
    options = ("-i", str(one.key.file), "-o", "SendEnv=LC_* COLORTERM ODD")
    ask = "bash -c 'printf é | wc -m'; perl -e 1; echo $LC_ALL $COLORTERM $ODD"
    command = [*ssh_command(one, one.on, *options), ask]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\nfr_FR.UTF-8 truecolor\n", "")
    for terminal in ("xterm-kitty", "xterm-ghostty", "alacritty", "wezterm", "foot"):
        assert one.ssh(f"TERM={terminal} infocmp").returncode == 0, terminal
    assert one.ssh("TERM=never-heard-of bash -lc 'echo $TERM'").stdout == "xterm-256color\n"


@contextmanager
def agent_with(key: Path) -> Iterator[str]:
    """Yield the socket of a new agent with that key."""
    socket = f"{key}.agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL) as agent:
        wait_until(lambda: takes_connections(Path(socket)), "the agent listens")
        subprocess.run(["ssh-add", "-q", str(key)], env=os.environ | {"SSH_AUTH_SOCK": socket}, check=True)
        yield socket
        agent.terminate()
