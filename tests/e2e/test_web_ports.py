"""A renter's web port in a real Chromium: it works, follows a migration, and has no access to other rentals."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from renter import Renter
from stack import MOVED_WITHIN_S, Stack
from waiting import eventually

from orion.client.sdk import Orion
from orion.wire import Rental, RentalState

PORT = "8000"
SERVED = Path(__file__).with_name("served.py").read_text()
START = "while [ ! -s served.py ]; do sleep 0.1; done; exec python3 served.py"
WITHIN_S = 60.0


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    context = chromium.new_context()
    context.set_default_timeout(WITHIN_S * 1000)
    yield context
    context.close()


def serving(orion: Orion, renter: Renter, name: str) -> Rental:
    rental = orion.rent(name=name, ssh_public_key=renter.public_key, start=START)
    assert rental.state is RentalState.ACTIVE, rental.explanation
    written = renter.ssh(rental, f"cat > served.new <<'END'\n{SERVED}\nEND\nmv served.new served.py")
    assert written.returncode == 0, written.stderr
    return rental


def served_by(url: str, **headers: str) -> str:
    """Return the hostname of the worker that answers at the address, or an empty string if none answers."""
    try:
        reply = httpx.get(f"{url}who", headers=headers, timeout=WITHIN_S / 3, trust_env=False)
    except httpx.TimeoutException:  # a migrating rental may answer late
        return ""
    return reply.text if reply.status_code == 200 else ""


def loads(page: Page, url: str) -> None:
    page.goto(url)
    expect(page).to_have_title("loaded", timeout=WITHIN_S * 1000)


def found(page: Page) -> dict[str, Any]:
    return dict(json.loads(page.evaluate("found()")))


def seen(renter: Renter, rental: Rental) -> str:
    """Return all requests that the rental's server has received."""
    return renter.ssh(rental, "cat seen.jsonl").stdout


def test_a_web_port_works_in_a_browser_follows_a_migration_and_gets_no_secret(
    stack: Stack, orion: Orion, renter: Renter, context: BrowserContext
) -> None:
    rental = serving(orion, renter, "served")
    path = f"{stack.url}/r/{rental.id}/{PORT}/"
    token = {"Authorization": f"Bearer {renter.token}"}
    assert httpx.get(path, timeout=WITHIN_S, trust_env=False).json()["code"] == "private"
    before = eventually("the page is served", lambda: served_by(path, **token), WITHIN_S)

    # On the platform's own address the page is in a sandbox, where everything works that needs no origin.
    page = context.new_page()
    loads(page, renter.orion("open", rental.name, PORT, "--path").stdout.strip())
    assert page.url.startswith(f"{path}~"), page.url
    its = found(page)
    assert (its["origin"], its["cookie"], its["storage"]) == ("null", "SecurityError", "SecurityError")
    assert (its["data"], its["posted"], its["socket"]) == ('"data"', '"data"', "echoed")
    assert (its["coloured"], its["image"]) == ("rgb(1, 2, 3)", 7)
    assert context.cookies() == []
    for address in ("/api/status", "/terminal/", f"/r/{rental.id}/8001/"):
        tried = json.loads(page.evaluate("tries(arguments_)".replace("arguments_", json.dumps(stack.url + address))))
        assert tried == {"fetched": "TypeError", "socket": "refused", "script": "refused", "framed": "closed"}, address

    # On its own host name the page has an origin of its own. Two keys that are made in one second are equal.
    made_at = int(time.time())
    eventually("the next second has begun", lambda: int(time.time()) > made_at, WITHIN_S)
    own = context.new_page()
    loads(own, renter.orion("open", rental.name, PORT).stdout.strip())
    host = f"{PORT}-{rental.id}.localhost:{stack.http_port}"
    assert own.url == f"http://{host}/"
    its = found(own)
    assert (its["origin"], its["cookie"], its["storage"]) == (f"http://{host}", "own=1", "1")
    assert (its["data"], its["posted"], its["socket"]) == ('"data"', '"data"', "echoed")
    assert (its["coloured"], its["image"]) == ("rgb(1, 2, 3)", 7)
    [ours] = [cookie for cookie in context.cookies() if cookie["name"] == "orion_port"]
    assert (ours["httpOnly"], ours["sameSite"], ours["domain"]) == (True, "Lax", host.partition(":")[0])

    # A public port is open to everybody, also after a migration.
    public = renter.orion("expose", rental.name, PORT, "--public", "--path").stdout
    assert path in public
    assert served_by(path) == before
    renter.orion("migrate", rental.name)
    expect(own).to_have_title("cut", timeout=WITHIN_S * 1000)
    after = eventually("the target serves the page", lambda: served_by(path), MOVED_WITHIN_S)
    assert after != before
    loads(own, f"http://{host}/")
    loads(page, page.url)
    renter.orion("expose", rental.name, PORT, "--private")
    assert httpx.get(path, timeout=WITHIN_S, trust_env=False).json()["code"] == "private"
    loads(own, f"http://{host}/")

    all_of_it = seen(renter, rental)
    for secret in (renter.token, ours["value"], "X-Orion", "orion_port", "Authorization"):
        assert secret not in all_of_it, secret
    renter.orion("release", rental.name, "--yes")
    gone = httpx.get(path, headers=token, timeout=WITHIN_S, trust_env=False)
    assert (gone.status_code, gone.json()["code"]) == (404, "ended")
    kinds = [event.kind for event in orion.events(rental_id=rental.id) if event.kind.startswith("rental.port")]
    assert kinds == ["rental.port_opened", "rental.port_opened", "rental.port_published", "rental.port_closed"]


def test_a_page_of_one_rental_reads_nothing_of_another_rental_in_the_same_browser(
    stack: Stack, orion: Orion, renter: Renter, context: BrowserContext
) -> None:
    mine, hostile = serving(orion, renter, "mine"), serving(orion, renter, "hostile")
    for rental in (mine, hostile):
        path = f"{stack.url}/r/{rental.id}/{PORT}/"
        token = {"Authorization": f"Bearer {renter.token}"}
        eventually("the page is served", lambda path=path, token=token: served_by(path, **token), WITHIN_S)
    page = context.new_page()
    addresses = {}
    for way in ((), ("--path",)):
        for rental in (mine, hostile):
            loads(page, renter.orion("open", rental.name, PORT, *way).stdout.strip())
            addresses[rental.id, way] = page.url
    asked_before = seen(renter, mine)
    refused = {"fetched": "TypeError", "socket": "refused", "script": "refused"}
    for way in ((), ("--path",)):
        loads(page, addresses[hostile.id, way])
        for target in (f"http://{PORT}-{mine.id}.localhost:{stack.http_port}/", f"{stack.url}/r/{mine.id}/{PORT}/"):
            tried = json.loads(page.evaluate(f"tries({json.dumps(target)})"))
            assert tried.pop("framed") in {"closed", "SecurityError"}, (way, target)
            assert tried == refused, (way, target)
    assert seen(renter, mine) == asked_before, "not even asked"
    loads(page, addresses[mine.id, ()])
