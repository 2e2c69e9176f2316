"""Tests of the walls around a renter on its worker, tried by a renter."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rental_support import Rental, new_rental
from worker_support import (
    CAPABILITIES,
    IMAGE,
    PIDS_LIMIT,
    ROOT,
    SESSION_S,
    SYSCTLS,
    TMPFS,
    SmallManager,
    Worker,
    WorkerNetwork,
    docker,
    wait_until,
)

CONNECT = """
import socket, sys
try:
    with socket.create_connection(({address!r}, {port}), timeout=2): print("open")
except ConnectionRefusedError: print("refused")
except TimeoutError: print("silent")
except OSError as error: print(error.strerror)
"""
FILTERED = "No route to host"
"""The error of a connection that the worker's own filter rejects."""


@pytest.fixture(scope="module")
def rental(host: Worker, tmp_path_factory: pytest.TempPathFactory) -> Rental:
    return new_rental(host, tmp_path_factory.mktemp("keys")).create_quickly()


@pytest.fixture
def listening(rental: Rental) -> Iterator[int]:
    """Yield the port of a renter's web server, which accepts connections from every address."""
    rental.ssh("setsid python3 -m http.server --bind 0.0.0.0 8000 >/dev/null 2>&1 </dev/null &")
    wait_until(lambda: "open" in rental.python(CONNECT.format(address="127.0.0.1", port=8000)), "it listens")
    yield 8000
    rental.ssh("pkill -f http.server")


def test_a_renter_reaches_no_neighbour_no_manager_and_no_local_address(
    rental: Rental, neighbour: Worker, network: WorkerNetwork, shared_manager: SmallManager
) -> None:
    manager_port = int(shared_manager.url.rsplit(":", 1)[1])
    for address, port in (
        (neighbour.address, 22),
        (network.gateway, manager_port),
        (network.gateway, 22),
        ("169.254.169.254", 80),
    ):
        assert rental.python(CONNECT.format(address=address, port=port)).strip() == FILTERED, address
    reached = rental.on.run("python3", "-c", CONNECT.format(address=network.gateway, port=manager_port))
    assert reached.strip() == "open", "the agent, as root, must reach its manager"


def test_a_renter_sends_no_datagram_to_a_neighbour_even_from_a_socket_closed_at_once(
    rental: Rental, neighbour: Worker
) -> None:
    """Count the packets that arrive at the neighbour, because its own filter would hide them.

    The count includes its heartbeats, some ten packets a second: on a busy machine this may last a minute.
    """
    counter = "awk '$1 ~ /eth0/ {print $3}' /proc/net/dev"
    before = int(neighbour.run("sh", "-c", counter))
    rental.python(
        f"""
import socket
for _ in range(6000):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try: s.sendto(b"x", ({neighbour.address!r}, 9))
    except OSError: pass
    s.close()
    s = socket.socket(); s.setblocking(False)
    try: s.connect(({neighbour.address!r}, 22))
    except OSError: pass
    s.close()
"""
    )
    assert int(neighbour.run("sh", "-c", counter)) - before < 2000


def test_a_renters_port_is_open_to_itself_and_its_tunnel_and_not_to_the_neighbours(
    rental: Rental, neighbour: Worker, listening: int
) -> None:
    from_neighbour = neighbour.run("python3", "-c", CONNECT.format(address=rental.on.address, port=listening))
    assert from_neighbour.strip() == "silent"
    request = "GET / HTTP/1.0\r\n\r\n"
    tunnel = rental.on.ssh_command(rental.username, rental.key, "-W", f"127.0.0.1:{listening}")
    done = subprocess.run(tunnel, input=request, capture_output=True, text=True, check=False, timeout=SESSION_S)
    assert "200 OK" in done.stdout


def test_a_renter_s_tunnel_reaches_only_its_own_worker(rental: Rental, neighbour: Worker) -> None:
    for target in (f"{neighbour.address}:22", "127.0.0.1:22"):
        tunnel = rental.on.ssh_command(rental.username, rental.key, "-W", target)
        done = subprocess.run(tunnel, input="", capture_output=True, text=True, check=False, timeout=SESSION_S)
        assert done.returncode != 0
        assert "SSH-2.0" not in done.stdout


def test_sshd_refuses_other_workers_and_renters_inside_the_worker(rental: Rental, neighbour: Worker) -> None:
    from_neighbour = neighbour.run("python3", "-c", CONNECT.format(address=rental.on.address, port=22))
    assert from_neighbour.strip() == "silent"
    for address in ("127.0.0.1", rental.on.address, "::1"):
        assert rental.python(CONNECT.format(address=address, port=22)).strip() in (
            FILTERED,
            "Permission denied",
            "Cannot assign requested address",
        )


def test_a_renter_cannot_listen_on_the_port_of_sshd_while_sshd_is_down(rental: Rental) -> None:
    program = "import socket\ntry: socket.socket().bind(('', 22))\nexcept PermissionError: print('refused')"
    assert rental.python(program) == "refused\n"
    assert "warning" not in rental.on.log()


def test_renters_and_root_can_resolve_host_names(rental: Rental, neighbour: Worker) -> None:
    command = f"getent hosts {neighbour.name}"
    assert neighbour.address in rental.ssh(command).stdout
    assert neighbour.address in rental.on.run("sh", "-c", command)


def test_a_renter_reads_no_secret_of_the_worker_and_no_other_home(rental: Rental, folder: Path) -> None:
    other = new_rental(rental.on, folder).create_quickly()
    for place in (
        "/run/orion-join/token",
        "/var/lib/orion/agent/identity.json",
        "/etc/orion/keys/root",
        f"/etc/orion/keys/{other.username}",
        "/etc/ssh/ssh_host_ed25519_key",
        "/etc/shadow",
    ):
        done = rental.ssh(f"cat {place}")
        assert "Permission denied" in done.stderr, place
        rental.on.run("test", "-s", place)
    for folder_name in ("/run/orion-join", "/var/lib/orion/rentals", "/etc/orion/locked", f"/home/{other.username}"):
        assert "Permission denied" in rental.ssh(f"ls {folder_name}").stderr, folder_name


def test_agent_and_sshd_have_no_network_capability_and_a_renter_has_no_capability(rental: Rental) -> None:
    net_admin, net_raw, setpcap = 1 << 12, 1 << 13, 1 << 8
    status = rental.on.run("sh", "-c", "cat /proc/$(pgrep -o -x orion-agent)/status /proc/$(pgrep -o -x sshd)/status")
    sets = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")]
    assert len(sets) == 10
    assert not any(capabilities & (net_admin | net_raw | setpcap) for capabilities in sets)
    over_ssh = rental.on.ssh("root", rental.on.key, "nft flush ruleset")
    assert "Operation not permitted" in over_ssh.stderr
    assert "CapPrm:\t0000000000000000" in rental.ssh("cat /proc/self/status").stdout
    assert rental.ssh("find / -xdev -type f -perm /6000").stdout == ""


def test_the_manager_reaches_a_worker_whose_renter_is_at_its_process_limit(rental: Rental) -> None:
    limit = (PIDS_LIMIT - 64) // 4
    hoard = [*rental.on.ssh_command(rental.username, rental.key), "python3 -"]
    program = """
import os, time, sys
made = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60); os._exit(0)
        made += 1
except OSError: print(made, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(hoard, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hoarder:
        assert hoarder.stdin
        assert hoarder.stdout
        hoarder.stdin.write(program)
        hoarder.stdin.close()
        made = int(hoarder.stdout.readline())
        assert limit - 10 <= made <= limit
        assert rental.on.ssh("root", rental.on.key, "echo in").stdout == "in\n"
        assert hoarder.poll() is None, "its processes were there all the time"
        status, report = rental.on.rental("lock", rental_id=rental.rental_id, epoch=1, kill=True)
        assert status == 0
        assert report["killed"] >= made
    rental.on.rental("unlock", rental_id=rental.rental_id, epoch=1)
    assert rental.accepts()


def test_the_oom_killer_prefers_processes_of_ssh_sessions_to_the_agent(rental: Rental) -> None:
    assert rental.ssh("cat /proc/self/oom_score_adj").stdout.strip() in {"500", "1000"}
    scores = "for one in 1 $(pgrep -o -x orion-agent) $(pgrep -o -x confine.py) $(pgrep -o -x sshd)"
    found = rental.on.run("sh", "-c", f"{scores}; do cat /proc/$one/oom_score_adj; done")
    assert found.split() == ["0", "0", "0", "500"]


def test_failed_log_ins_of_a_renter_do_not_block_the_manager_s_address(rental: Rental, folder: Path) -> None:
    other = new_rental(rental.on, folder)
    for _ in range(12):
        assert not rental.accepts(other.key)
    assert rental.accepts()


def test_sftp_uploads_and_downloads_files(rental: Rental, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("and back")
    sftp = rental.on.ssh_command(rental.username, rental.key)
    sftp = ["sftp", "-q", "-b", "-", *sftp[1:]]
    batch = f"put {tmp_path}/there file\nget file {tmp_path}/back\n"
    done = subprocess.run(sftp, input=batch, capture_output=True, text=True, check=False, timeout=SESSION_S)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back").read_text() == "and back"


def test_a_worker_without_its_packet_filter_does_not_start(worker_image: str) -> None:
    confinement = [f"--cap-add={each}" for each in CAPABILITIES if each != "NET_ADMIN"]
    done = subprocess.run(
        ["docker", "run", "--rm", "--cap-drop=ALL", *confinement, "-e", "ORION_APP_ADDRESS=172.17.0.1", IMAGE],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the packet filter could not be set" in done.stderr.splitlines()[-1]


def test_the_tests_start_workers_with_the_restrictions_of_docker_compose(host: Worker) -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker"]
    assert service["cap_drop"] == ["ALL"]
    assert sorted(service["cap_add"]) == sorted(CAPABILITIES)
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["sysctls"] == SYSCTLS
    assert service["tmpfs"] == TMPFS
    inspected = docker("inspect", "-f", "{{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}", host.name)
    assert inspected.split() == ["[ALL]", "[no-new-privileges:true]"]
