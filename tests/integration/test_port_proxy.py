"""The port proxy of a real worker: which processes it leads to, and which requests it takes."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from orion_worker.web.port_tokens import PortToken, signature
from rental_support import Rental, new_rental
from support.patience import PATIENCE_S
from test_worker_walls import CONNECT, FILTERED
from worker_support import Worker, WorkerNetwork, docker, wait_until

PORT = 8100
"""Of this file alone: its worker is shared with other tests."""
SERVER = """
import socket
server = socket.create_server(({address!r}, {port}), family=socket.{family}, dualstack_ipv6={both})
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n{says}")
    while part := connection.recv(65536): connection.sendall(part)
    connection.close()
"""


@pytest.fixture(scope="module")
def rental(host: Worker, tmp_path_factory: pytest.TempPathFactory) -> Rental:
    return new_rental(host, tmp_path_factory.mktemp("keys")).create_quickly()


@pytest.fixture(scope="module")
def other(host: Worker, tmp_path_factory: pytest.TempPathFactory) -> Rental:
    """Return the rental of another renter on the same worker."""
    return new_rental(host, tmp_path_factory.mktemp("keys")).create_quickly()


@contextmanager
def serving(rental: Rental, says: str, address: str = "127.0.0.1", port: int = PORT) -> Iterator[None]:
    family = "AF_INET6" if ":" in address else "AF_INET"
    program = SERVER.format(address=address, port=port, family=family, both=":" in address, says=says)
    command = rental.on.ssh_command(rental.username, rental.key)
    with subprocess.Popen(
        [*command, f"python3 -c {shlex.quote(program)}"], stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout
            assert running.stdout.readline() == "listening\n"
            yield
        finally:
            rental.ssh("pkill -f create_server")
            with suppress(subprocess.TimeoutExpired):
                running.wait(PATIENCE_S)  # it ends after the server: then the port is free
            running.kill()


def request(way: PortToken, session: str) -> bytes:
    access_token = f"{way.text} {signature(session, way)}"
    return f"GET /x HTTP/1.1\r\nHost: h\r\nX-Orion-Pass: {access_token}\r\n\r\n".encode()


def session_of(worker: Worker) -> str:
    return worker.run("cat", "/run/orion/session")


def ask(rental: Rental, port: int = PORT, epoch: int = 0, session: str = "") -> str:
    """Return the answer, up to a second of silence, to a request from the address of app and proxy."""
    way = PortToken(rental_id=rental.rental_id, epoch=epoch or rental.epoch, port=port)
    with socket.create_connection((rental.on.address, 80), timeout=PATIENCE_S) as there:
        there.sendall(request(way, session or session_of(rental.on)))
        answer = there.recv(65536)
        while answer and not answer.partition(b"\r\n\r\n")[2]:
            answer += there.recv(65536)
        return answer.decode().partition("\r\n\r\n")[2]


def refused(answer: str) -> str:
    return str(json.loads(answer)["code"])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])  # noqa: S104
def test_a_rental_s_server_is_reached_at_any_address_on_which_it_listens(
    rental: Rental, other: Rental, address: str
) -> None:
    with serving(rental, "mine", address):
        assert ask(rental) == "mine"
        assert refused(ask(other)) == "nothing_listens", "another rental's address leads to no neighbour's server"
    assert refused(ask(rental)) == "nothing_listens"


def test_a_port_on_which_root_listens_belongs_to_no_rental(rental: Rental) -> None:
    program = SERVER.format(address="127.0.0.1", port=8101, family="AF_INET", both=False, says="root")
    docker("exec", "--detach", rental.on.name, "python3", "-c", program)
    wait_until(lambda: "open" in rental.on.run("python3", "-c", CONNECT.format(address="127.0.0.1", port=8101)), "it")
    assert refused(ask(rental, 8101)) == "nothing_listens"
    for port in (22, 80):
        assert refused(ask(rental, port)) == "no_pass"
    rental.on.run("pkill", "-f", "create_server")


def test_a_former_epoch_another_session_and_an_unknown_rental_are_refused(rental: Rental, neighbour: Worker) -> None:
    with serving(rental, "mine"):
        for epoch in (rental.epoch + 1, rental.epoch + 1000):
            assert refused(ask(rental, epoch=epoch)) == "not_here"
        assert refused(ask(rental, session=session_of(neighbour))) == "no_pass"
        elsewhere = Rental(neighbour, rental.key, rental.rental_id, rental.uid)
        assert refused(ask(elsewhere)) == "not_here"


def test_only_the_proxy_reaches_the_port_proxy_and_the_ports_of_rentals(
    rental: Rental, neighbour: Worker, network: WorkerNetwork
) -> None:
    worker = rental.on
    with serving(rental, "mine", "0.0.0.0"):  # noqa: S104
        assert neighbour.run("python3", "-c", CONNECT.format(address=worker.address, port=80)).strip() == "silent"
        for address in ("127.0.0.1", worker.address):
            assert rental.python(CONNECT.format(address=address, port=80)).strip() in {FILTERED, "Permission denied"}
        with pytest.raises(TimeoutError):  # from the address of app and proxy
            socket.create_connection((worker.address, PORT), timeout=1)
    assert "Permission denied" in rental.ssh("cat /run/orion/session").stderr


def test_a_frozen_rental_answers_no_request_and_its_open_connections_are_cut(rental: Rental) -> None:
    with serving(rental, "mine"):
        way = PortToken(rental_id=rental.rental_id, epoch=rental.epoch, port=PORT)
        with socket.create_connection((rental.on.address, 80), timeout=PATIENCE_S) as there:
            there.sendall(request(way, session_of(rental.on)))
            assert there.recv(1000).startswith(b"HTTP/1.1 200")
            status, report = rental.on.rental("freeze", rental_id=rental.rental_id, epoch=rental.epoch)
            assert (status, report["state"]) == (0, "frozen")
            try:
                while there.recv(1000):
                    pass
            except ConnectionResetError:
                pass
        assert refused(ask(rental)) == "frozen"
        rental.on.rental("thaw", rental_id=rental.rental_id, epoch=rental.epoch)
        assert ask(rental) == "mine"


def test_the_port_proxy_has_no_capability_and_is_restarted_when_it_dies(rental: Rental) -> None:
    worker = rental.on

    def port_proxy() -> str:
        return worker.run("pgrep", "-f", "orion-web", check=False).strip()

    before = port_proxy()
    status = worker.run("cat", f"/proc/{before}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "CapPrm:\t0000000000000000" in status
    worker.run("kill", "-9", before)
    wait_until(lambda: port_proxy() not in {"", before}, "the agent starts it again")
    with serving(rental, "mine"):
        assert ask(rental) == "mine"


def test_after_a_release_the_port_of_the_rental_answers_no_request(host: Worker, tmp_path: Path) -> None:
    rental = new_rental(host, tmp_path).create_quickly()
    with serving(rental, "mine"):
        assert ask(rental) == "mine"
        status, report = host.rental("purge", **rental.variables)
        assert (status, report["left"]) == (0, []), report
        deadline = time.monotonic() + 10
        while (found := refused(ask(rental))) != "not_here":
            assert time.monotonic() < deadline, found
