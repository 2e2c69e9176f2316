"""Attacks of a worker that an attacker controls as root: it must never become more than that worker.

It has its token and the join token, and an address of its own in orion_net, and calls the real manager through the real
proxy. Its attacks on the engine are in test_attacks_engine.py.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from platform_support import WORKER_KEY, Platform
from proxy_support import wait_until
from support.builders import host_key

OWN_KEY = host_key(8)
SESSION = "0123456789abcdef0123456789abcdef"
CLAIM = {"hostname": "evil", "ssh_host_keys": [OWN_KEY], "slots": 4, "boot_id": "boot-evil", "agent_version": "0.1"}


@dataclass
class Mallory:
    """Root on a worker: its address, its token, its session, and the join token, which each worker can read."""

    http: httpx.Client
    join_token: str
    address: str
    worker_id: str = ""
    token: str = ""
    session: str = ""
    seq: int = 0

    def register(self, token: str, headers: dict[str, str] | None = None, **claim: Any) -> httpx.Response:
        return self._send("/api/register", token, CLAIM | claim, headers or {})

    def beat(self, **fields: Any) -> httpx.Response:
        self.seq += 1
        body = {"session_id": self.session, "seq": self.seq} | fields
        return self._send("/api/heartbeat", self.token, body, {})

    def become(self, reply: httpx.Response) -> None:
        assert reply.status_code == 201, reply.text
        answer = reply.json()
        self.worker_id, self.token, self.session, self.seq = (
            answer["worker_id"], answer["worker_token"], answer["session_id"], 0,
        )  # fmt: skip

    def _send(self, path: str, token: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        return self.http.post(path, json=body, headers={"Authorization": f"Bearer {token}"} | headers)


@pytest.fixture(scope="module")
def address(attacked: Platform) -> Iterator[str]:
    """Return an address in the proxy's network that is not the honest worker's."""
    own = f"{attacked.proxy.network}.77"
    inspect = ["docker", "network", "inspect", "-f", "{{.Id}}", f"{attacked.proxy.project}_orion_net"]
    network = subprocess.run(inspect, check=True, capture_output=True, text=True).stdout
    place = [f"{own}/32", "dev", f"br-{network[:12]}"]
    subprocess.run(["ip", "address", "add", *place], check=True)
    yield own
    subprocess.run(["ip", "address", "del", *place], check=True)


@pytest.fixture
def mallory(attacked: Platform, address: str) -> Iterator[Mallory]:
    # A connection for each call: Nginx ends one after an answer that came before the body of its request.
    transport = httpx.HTTPTransport(local_address=address, limits=httpx.Limits(max_keepalive_connections=0))
    url = f"http://{attacked.proxy.network}.2"
    with httpx.Client(base_url=url, transport=transport, trust_env=False, timeout=60) as http:
        made = Mallory(http, attacked.secrets.join_token, address)
        made.become(made.register(made.join_token))
        yield made


@pytest.fixture(scope="module")
def rental(attacked: Platform) -> dict[str, Any]:
    """Return a rental of another owner on the honest worker."""
    with attacked.client(attacked.token("alice")) as alice:
        reply = alice.post("/api/rent", json={"name": "treasure", "ssh_public_key": host_key(3)})
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def workers(attacked: Platform) -> dict[str, dict[str, Any]]:
    with attacked.client() as admin:
        return {worker["id"]: worker for worker in admin.get("/api/workers").json()["items"]}


def now(attacked: Platform, rental: dict[str, Any]) -> dict[str, Any]:
    with attacked.client() as admin:
        return dict(admin.get(f"/api/rentals/{rental['id']}").raise_for_status().json())


def code(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    return str(reply.json()["code"])


# Its token


def test_a_worker_s_token_permits_only_the_calls_of_a_worker(
    attacked: Platform, mallory: Mallory, rental: dict[str, Any]
) -> None:
    victim = rental["worker_id"]
    calls = [
        ("GET", "/api/workers"), ("GET", f"/api/workers/{victim}"), ("DELETE", f"/api/workers/{victim}"),
        ("POST", f"/api/workers/{victim}/drain"), ("POST", f"/api/workers/{victim}/resume"),
        ("POST", f"/api/workers/{mallory.worker_id}/resume?give_up=true"),
        ("POST", "/api/rent"), ("GET", "/api/rentals"), ("GET", f"/api/rentals/{rental['id']}"),
        ("DELETE", f"/api/rentals/{rental['id']}"), ("POST", f"/api/rentals/{rental['id']}/renew"),
        ("GET", "/api/events"), ("GET", "/api/status"), ("GET", "/api/tokens"), ("POST", "/api/tokens"),
        ("DELETE", "/api/tokens/x"), ("GET", "/api/admin/backup"), ("POST", "/api/admin/restore"),
    ]  # fmt: skip
    for token in (mallory.token, mallory.join_token):
        for method, path in calls:
            reply = mallory.http.request(method, path, headers={"Authorization": f"Bearer {token}"}, json={})
            assert code(reply, 403) == "forbidden", path
    assert code(mallory.http.post("/api/heartbeat", headers={"Authorization": f"Bearer {mallory.join_token}"}), 403)
    assert now(attacked, rental)["state"] == "active"


def test_heartbeats_and_goodbyes_for_another_worker_have_no_effect(
    attacked: Platform, mallory: Mallory, rental: dict[str, Any]
) -> None:
    victim = rental["worker_id"]
    heard = workers(attacked)[victim]["last_heartbeat_at"]
    for session in (attacked.session, SESSION, "00000000"):
        for fields in ({}, {"leaving": True}, {"seq": 2**53 - 1}):
            assert code(mallory.beat(session_id=session, **fields), 409) == "stale_session"
    wait_until(lambda: workers(attacked)[victim]["last_heartbeat_at"] != heard, "the victim's own heartbeats count")
    assert workers(attacked)[victim]["health"] == "ready"


def test_a_former_session_and_token_of_a_worker_are_refused(mallory: Mallory) -> None:
    """Use a session and token that were copied from a worker before it registered again."""
    token, session = mallory.token, mallory.session
    mallory.become(mallory.register(mallory.join_token))
    assert mallory.token != token
    stale = mallory.http.post(
        "/api/heartbeat", json={"session_id": session, "seq": 9}, headers={"Authorization": f"Bearer {token}"}
    )
    assert code(stale, 401) == "unauthorized"
    assert code(mallory.beat(session_id=session), 409) == "stale_session"
    assert mallory.beat().status_code == 200


# Another's address, another's keys


def test_a_worker_with_another_worker_s_host_keys_is_a_new_one_and_never_ready(
    attacked: Platform, mallory: Mallory, rental: dict[str, Any]
) -> None:
    victim = rental["worker_id"]
    assert code(mallory.register(mallory.token, ssh_host_keys=[WORKER_KEY]), 409) == "host_key_changed"
    mallory.become(mallory.register(mallory.join_token, ssh_host_keys=[WORKER_KEY]))
    assert mallory.worker_id != victim
    assert mallory.beat().status_code == 200
    wait_until(lambda: workers(attacked)[mallory.worker_id]["explanation"] != "", "it was tried and is explained")
    shown = workers(attacked)
    assert (shown[mallory.worker_id]["health"], shown[mallory.worker_id]["address"]) == ("joining", mallory.address)
    assert (shown[victim]["health"], shown[victim]["address"]) == ("ready", f"{attacked.proxy.network}.1")


def test_a_worker_at_another_s_address_is_refused_while_the_other_answers_there(
    attacked: Platform, rental: dict[str, Any]
) -> None:
    """Register from that address, as if it had been taken over, with new keys and the join token."""
    with attacked.client(attacked.secrets.join_token) as there:
        assert code(there.post("/api/register", json=CLAIM), 409) == "address_in_use"
    assert workers(attacked)[rental["worker_id"]]["health"] == "ready"


@pytest.mark.parametrize("header", ["X-Real-IP", "X-Forwarded-For", "Forwarded", "X-Orion-Proxy-Secret"])
def test_an_address_that_a_worker_only_claims_is_ignored(attacked: Platform, mallory: Mallory, header: str) -> None:
    reply = mallory.register(mallory.token, {header: f"{attacked.proxy.network}.1"})
    mallory.become(reply)
    assert workers(attacked)[mallory.worker_id]["address"] == mallory.address


# Inventories


@pytest.mark.parametrize("epochs_later", [0, 1, 1000])
def test_a_rental_that_another_worker_claims_to_hold_stays_on_its_own_worker(
    attacked: Platform, mallory: Mallory, rental: dict[str, Any], epochs_later: int
) -> None:
    def place() -> dict[str, Any]:
        """Leave out its snapshots, which have their own schedule."""
        shown = now(attacked, rental)
        return {key: shown[key] for key in ("id", "state", "epoch", "worker_id", "moving_to", "username")}

    before = place()
    item = {"rental_id": rental["id"], "username": rental["username"], "uid": 100_001, "state": "running"}
    claimed = [item | {"epoch": rental["epoch"] + epochs_later}]
    registered = mallory.register(mallory.token, inventory=claimed)
    mallory.become(registered)
    for reply in (registered, mallory.beat(inventory=claimed)):
        orders = reply.json()["placements"]
        assert [order["want"] for order in orders] == ["purge"]
    assert place() == before


def item(number: int, **change: Any) -> dict[str, Any]:
    name = f"evil{number:06d}".translate(str.maketrans("0123456789", "abcdefghij"))
    return {
        "rental_id": name,
        "username": f"r-{name}",
        "uid": 100_000 + number,
        "epoch": 1,
        "state": "running",
    } | change


STRANGE = {
    "one too many": [item(number) for number in range(10_001)],
    "a command for an id": [item(1, rental_id="a;reboot;a")],
    "a way for an id": [item(1, rental_id="../../../")],
    "a template for a name": [item(1, username="r-{{ lookup('pipe', 'id') }}")],
    "root's uid": [item(1, uid=0)],
    "no epoch": [item(1, epoch=0)],
    "an enormous epoch": [item(1, epoch=2**64)],
    "another state": [item(1, state="root")],
    "something more": [item(1, want="run")],
}


@pytest.mark.parametrize("what", STRANGE)
def test_an_invalid_inventory_is_refused_as_a_whole(mallory: Mallory, what: str) -> None:
    assert code(mallory.beat(inventory=STRANGE[what]), 422) == "invalid_request"
    assert code(mallory.register(mallory.token, inventory=STRANGE[what]), 422) == "invalid_request"
    assert mallory.beat().status_code == 200


def test_the_proxy_cuts_off_an_inventory_that_is_too_long(mallory: Mallory) -> None:
    body = b'{"inventory": [' + b" " * (3 << 20) + b"]}"
    headers = {"Authorization": f"Bearer {mallory.token}", "Content-Type": "application/json"}
    assert code(mallory.http.post("/api/heartbeat", content=body, headers=headers), 413)


def test_the_largest_inventory_and_one_with_duplicates_delay_no_other_call(
    attacked: Platform, mallory: Mallory, rental: dict[str, Any]
) -> None:
    largest = [item(number % 5000, epoch=1 + number // 5000) for number in range(10_000)]
    with attacked.client(attacked.token("bob")) as bob, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: [mallory.beat(inventory=largest).status_code for _ in range(5)])
        mine = bob.post("/api/rent", json={"ssh_public_key": host_key(3)})
        assert mine.status_code == 201
        assert bob.delete(f"/api/rentals/{mine.json()['id']}?wait_s=20").status_code == 200
        assert sent.result() == [200] * 5
    assert workers(attacked)[rental["worker_id"]]["health"] == "ready"


def test_a_lease_that_a_worker_invents_counts_up_to_the_longest_one_ever_given(mallory: Mallory) -> None:
    assert code(mallory.beat(lease_s=1e9), 422) == "invalid_request"
    assert mallory.beat(lease_s=86_400).json()["lease_s"] == 75


# A storm

REGISTRATIONS_AT_ONCE, REGISTRATIONS_PER_S = 50, 5
"""How many registrations an address may send, by manager_proxy/routes.conf and limits.conf."""


def test_a_flood_of_registrations_is_cut_leaves_few_workers_and_disturbs_no_other(
    attacked: Platform, mallory: Mallory, rental: dict[str, Any]
) -> None:
    before = set(workers(attacked))

    def storm(number: int) -> int:
        return mallory.register(mallory.join_token, ssh_host_keys=[host_key(1000 + number)]).status_code

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(storm, range(200)))
    assert answers.keys() == {201, 429}
    assert answers[201] <= REGISTRATIONS_AT_ONCE + REGISTRATIONS_PER_S * (time.monotonic() - began) + 1
    after = workers(attacked)
    assert len(set(after) - before) <= 1
    assert after[rental["worker_id"]]["health"] == "ready"
    assert now(attacked, rental)["state"] == "active"
