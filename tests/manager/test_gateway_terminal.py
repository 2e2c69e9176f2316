"""A terminal in a browser: tickets, reloads, the bytes in both directions, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest
from starlette.websockets import WebSocket
from structlog.testing import capture_logs
from support.browser import is_connected, opening, terminal, ticket, turns
from support.harness import Agent, Harness
from support.short_tokens import Short
from support.way_in import connecting

from orion.manager.gateway import relay, tickets
from orion.manager.gateway.relay import Ending
from orion.manager.gateway.terminal import (
    INPUT_BYTES,
    MAX_FRAME_BYTES,
    REPORT_INPUT_BYTES,
    TIME_OVER,
    TerminalPage,
    Terms,
    serve,
)
from orion.manager.gateway.tickets import LIFETIME_S, MOST_OF_ONE, RESUME_WITHIN_S
from orion.manager.ssh.port import Host, Shell, ShellLogin

HOST = {"x-forwarded-host": "orion.example:8443"}


async def rented(harness: Harness) -> tuple[Agent, str]:
    worker = await harness.join()
    return worker, str((await harness.rent())["id"])


async def rented_by(harness: Harness, short: Short) -> tuple[httpx.AsyncClient, str]:
    """Make the token and let a client with it rent."""
    await harness.join()
    client = harness.client(await short.begins(role="client"))
    rental_id = str((await client.post("/api/rent", json={"wait_s": 0})).json()["id"])
    await harness.settle()
    return client, rental_id


def has_terms(harness: Harness, **changed: float) -> None:
    harness.manager.terminals.terms = replace(Terms(), **changed)  # type: ignore[arg-type]


# Tickets


async def test_a_ticket_opens_a_shell_of_its_rental_as_the_renter_and_only_once(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    one = await ticket(harness.as_admin, rental_id)
    async with opening(harness, rental_id, one) as page:
        assert await page.client.is_in()
        assert await page.sees("connecting")
        await page.sees("connected")
    [shell] = harness.shells.opened
    assert shell.login.username == f"r-{rental_id}"
    assert (shell.login.rental_id, shell.login.epoch, shell.login.who) == (rental_id, 1, "admin")
    async with opening(harness, rental_id, one) as page:
        assert (await page.client.refusal())["code"] == "no_ticket"
    assert shell.closed
    assert len(harness.shells.opened) == 1


async def test_a_ticket_is_for_one_rental_and_for_a_minute(harness: Harness) -> None:
    await harness.join(slots=2)
    first, other = [str((await harness.rent())["id"]) for _ in range(2)]
    tried = await ticket(harness.as_admin, first)
    async with opening(harness, other, tried) as page:
        assert (await page.client.refusal())["status"] == 401
    async with opening(harness, first, tried) as page:
        assert (await page.client.refusal())["status"] == 401, "the attempt used the ticket up"
    late = await ticket(harness.as_admin, first)
    harness.clock.now += LIFETIME_S
    async with opening(harness, first, late) as page:
        assert (await page.client.refusal())["status"] == 401
    assert harness.shells.opened == []


async def test_only_the_owner_or_an_admin_gets_a_ticket_and_only_while_the_rental_is_active(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    mallory = await harness.new_client("mallory")
    assert (await mallory.post(f"/api/rentals/{rental_id}/terminal")).status_code == 404
    queued = (await harness.rent())["id"]
    refused = await harness.as_admin.post(f"/api/rentals/{queued}/terminal")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_active")
    assert "queued" in refused.json()["detail"]


async def test_a_ticket_of_an_ended_token_opens_no_terminal(harness: Harness, short: Short) -> None:
    client, rental_id = await rented_by(harness, short)
    one = await ticket(client, rental_id)
    await short.ends()
    async with opening(harness, rental_id, one) as page:
        assert (await page.client.refusal())["status"] == 401
    assert harness.shells.opened == []


async def test_one_owner_cannot_exhaust_the_tickets_of_others_and_tickets_are_kept_as_hashes(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    issued = [await ticket(harness.as_admin, rental_id) for _ in range(MOST_OF_ONE)]
    assert len(set(issued)) == MOST_OF_ONE
    assert len(issued[0]) == 43
    assert issued[0] not in str(vars(harness.manager.terminals.tickets))
    refused = await harness.as_admin.post(f"/api/rentals/{rental_id}/terminal")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_tickets")
    other = await harness.new_client("second-admin", "admin")
    assert await ticket(other, rental_id)
    harness.clock.now += LIFETIME_S
    assert await ticket(harness.as_admin, rental_id)
    assert len(harness.manager.terminals.tickets._kept) == 1


async def test_a_ticket_is_offered_as_the_second_subprotocol_and_no_token_helps(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    one = await ticket(harness.as_admin, rental_id)
    headers = {"authorization": f"Bearer {harness.secrets.admin_token}"}
    for offered in ((), ("orion.terminal",), (one,), (one, "orion.terminal"), ("x", one), ("orion.terminal", one, "x")):
        async with connecting(harness, f"/api/rentals/{rental_id}/terminal", headers, offered) as client:
            assert (await client.refusal())["code"] == "no_ticket"


STRANGE_ORIGINS = (
    *(
        "https://evil.example",
        "https://orion.example",
        "https://orion.example:3000",
        "null",
        "",
        "https://",
        "http://[",
    ),
    *("https://orion.example:8443.evil.example", "https://orion.example:8443@evil.example", "file://"),
)


async def test_a_foreign_page_opens_no_terminal_and_spends_no_ticket(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    one = await ticket(harness.as_admin, rental_id)
    for origin in STRANGE_ORIGINS:
        async with opening(harness, rental_id, one, origin=origin, **HOST) as page:
            refused = await page.client.refusal()
        assert (refused["status"], refused["code"]) == (403, "cross_site"), origin
    async with opening(harness, rental_id, one, origin="https://ORION.example:8443", **HOST) as page:
        assert await page.client.is_in()


async def test_no_page_opens_a_terminal_where_the_host_is_unknown(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id), origin="https://") as page:
        assert (await page.client.refusal())["status"] == 403


# Reloads


async def test_a_page_knows_the_name_of_its_rental(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(name="desk")
    async with opening(harness, rental["id"], await ticket(harness.as_admin, rental["id"])) as page:
        assert (await is_connected(page))["name"] == "desk"


async def resume_key(harness: Harness, rental_id: str) -> str:
    """Open a terminal and leave it as a page that is reloaded; return the key that the page got."""
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id)) as page:
        key = str((await is_connected(page))["resume"])
        page.client.said.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await page.client.ended()
    return key


async def test_a_page_that_is_reloaded_opens_its_terminal_again_and_no_other(harness: Harness) -> None:
    await harness.join(slots=2)
    first, other = [str((await harness.rent())["id"]) for _ in range(2)]
    key = await resume_key(harness, first)
    assert key not in str(vars(harness.manager.terminals.resumes)["_kept"].keys())
    async with opening(harness, other, key) as page:
        assert (await page.client.refusal())["status"] == 401
    async with opening(harness, first, key) as page:
        assert (await is_connected(page))["resume"] == key
    assert harness.shells.opened[-1].login.rental_id == first
    for path in (f"/api/rentals/{first}", "/api/status"):
        reply = await harness.as_admin.get(path, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 401, "the key is no token"


async def test_a_resume_key_ends_some_minutes_after_its_page_has_left(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    key = await resume_key(harness, rental_id)
    harness.clock.now += RESUME_WITHIN_S - 1
    async with opening(harness, rental_id, key) as page:
        await is_connected(page)
        harness.clock.now += 2 * RESUME_WITHIN_S
        async with opening(harness, rental_id, key) as second:
            await is_connected(second)
        page.client.said.put_nowait({"type": "websocket.disconnect", "code": 1006})
        await page.client.ended()
    harness.clock.now += RESUME_WITHIN_S
    async with opening(harness, rental_id, key) as page:
        assert (await page.client.refusal())["code"] == "no_ticket"


async def test_a_resume_key_ends_with_its_token(harness: Harness, short: Short) -> None:
    client, rental_id = await rented_by(harness, short)
    async with opening(harness, rental_id, await ticket(client, rental_id)) as page:
        key = (await is_connected(page))["resume"]
        page.client.said.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await page.client.ended()
    await short.ends()
    async with opening(harness, rental_id, key) as page:
        assert (await page.client.refusal())["status"] == 401


async def test_a_resume_key_ends_with_its_shell(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id)) as page:
        key = (await is_connected(page))["resume"]
        harness.shells.opened[-1].end("the shell has ended")
        assert (await page.is_closed())[0] == 1000
    async with opening(harness, rental_id, key) as page:
        assert (await page.client.refusal())["status"] == 401


async def test_a_reload_gives_a_terminal_no_more_time_than_it_had(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    has_terms(harness, total_s=60.0)
    key = await resume_key(harness, rental_id)
    harness.clock.now += 100.0
    async with opening(harness, rental_id, key) as page:
        assert await page.client.is_in()
        while (control := await page.control())["state"] != "ended":
            pass
    assert control["message"] == "a terminal stays open for 1 min at most"


async def test_closed_pages_keep_a_bounded_number_of_resume_keys(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    terminals = harness.manager.terminals
    principal = terminals.tickets.redeem(await ticket(harness.as_admin, rental_id), rental_id)
    assert principal is not None
    keys = []
    for _ in range(MOST_OF_ONE + 5):
        right = terminals.resumes.begin(rental_id, principal)
        with terminals.resumes.used(right):
            keys.append(right.key)
    assert [key for key in keys if terminals.resumes.redeem(key, rental_id)] == keys[5:], "the oldest go first"


# Bytes


async def test_bytes_pass_unchanged_in_both_directions(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    every = bytes(range(256))
    async with terminal(harness, rental_id) as (page, shell):
        page.types(every)
        await turns(lambda: shell.written == every, "the shell gets it")
        shell.say(every[::-1])
        assert await page.shown() == every[::-1]


async def test_the_shell_is_as_large_as_the_page_and_follows_it(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with terminal(harness, rental_id) as (page, shell):
        assert shell.size == (80, 24)
        page.controls(resize=[132, 43])
        await turns(lambda: shell.size == (132, 43), "the shell has the size")


async def test_the_shell_begins_with_the_size_of_the_page(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    begun: list[tuple[int, int]] = []
    open_one = harness.shells.open

    async def noted(host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        begun.append(size)
        return await open_one(host, login, size)

    harness.shells.open = noted  # type: ignore[method-assign]
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id), "columns=132&rows=43") as page:
        await is_connected(page)
    assert begun == [(132, 43)]


@pytest.mark.parametrize("query", ["columns=0&rows=1", "columns=1&rows=1001", "columns=x", "columns=1e9&rows=2"])
async def test_a_page_of_no_size_gets_no_shell(harness: Harness, query: str) -> None:
    _, rental_id = await rented(harness)
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id), query) as page:
        assert not await page.client.is_in()
    assert harness.shells.opened == []


NO_CONTROLS = (
    *("", "x", "[]", "{}", '{"state": "ended"}', '{"resize": [0, 1]}', '{"resize": [1, 1001]}', '{"resize": ["1", 1]}'),
    *('{"resize": 1}', '{"ack": 0}', '{"ack": -1}', '{"ack": "1"}', '{"ack": 1e99}', '{"ack": 1, "resize": [1, 1]}'),
    *(f'{{"ack": {"1" * 100}}}', "[" * 100),
)


async def test_an_invalid_control_message_ends_the_terminal(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    for text in NO_CONTROLS:
        async with terminal(harness, rental_id) as (page, shell):
            page.controls(text)
            code, words = await page.is_closed()
        assert (code, shell.closed) == (1003, True), text
        assert "control" in words


async def test_the_size_of_a_frame_is_limited(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with terminal(harness, rental_id) as (page, shell):
        page.types(bytes(MAX_FRAME_BYTES + 1))
        code, _ = await page.is_closed()
    assert (code, bytes(shell.written)) == (1009, b"")


# Flow


async def test_a_flood_stays_in_the_worker_until_the_page_says_that_it_was_shown(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    has_terms(harness, window_bytes=100_000, bytes_a_second=1e12)
    block = bytes(10_000)
    async with terminal(harness, rental_id) as (page, shell):
        for _ in range(50):
            shell.say(block)
        await turns(lambda: page.client.heard.qsize() == 10, "the window is full")
        await asyncio.sleep(0)
        assert shell.read_so_far == 110_000, "one more block waits"
        page.controls(ack=30_000)
        await turns(lambda: page.client.heard.qsize() == 13, "and goes on by what was shown")
        for _ in range(50):
            assert await page.shown() == block
            page.controls(ack=10_000)


async def test_excess_acknowledgements_of_a_page_count_for_nothing(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    has_terms(harness, window_bytes=20_000, bytes_a_second=1e12)
    async with terminal(harness, rental_id) as (page, shell):
        page.controls(ack=10**9)
        for _ in range(10):
            shell.say(bytes(10_000))
        await turns(lambda: shell.read_so_far == 30_000, "two are on the way, one waits")
        assert page.client.heard.qsize() == 2


async def test_a_page_that_does_not_acknowledge_can_still_type_and_gets_control_messages(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    has_terms(harness, window_bytes=1000)
    async with terminal(harness, rental_id) as (page, shell):
        for _ in range(3):
            shell.say(bytes(1000))
        assert await page.shown()
        page.types(b"\x03")
        page.types(bytes(REPORT_INPUT_BYTES))
        assert await page.control() == {"took": REPORT_INPUT_BYTES + 1}


async def test_input_that_the_shell_does_not_read_is_not_received_without_end(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    frame, frames = bytes(64 << 10), 100
    async with terminal(harness, rental_id) as (page, shell):
        shell.takes.clear()
        for _ in range(frames):
            page.types(frame)
        for _ in range(200):
            await asyncio.sleep(0)
        received = (frames - page.client.said.qsize()) * len(frame)
        assert INPUT_BYTES <= received <= 2 * INPUT_BYTES + len(frame), (
            "in the shell, in the queue to it, and one being written"
        )
        shell.takes.set()
        await turns(lambda: len(shell.written) == frames * len(frame), "all of it arrives")


async def test_an_echo_of_a_large_paste_and_the_paste_do_not_wait_for_each_other(harness: Harness) -> None:
    """The page keeps 64 KB on the way, so what it acknowledges never stands behind more than that."""
    _, rental_id = await rented(harness)
    has_terms(harness, window_bytes=64 << 10, bytes_a_second=1e12)
    chunk, wanted = bytes(16 << 10), 4 << 20
    async with terminal(harness, rental_id) as (page, shell):
        sent = took = echoed = shown = 0
        while shown < wanted:
            if sent < wanted and sent - took < 64 << 10:
                page.types(chunk)
                sent += len(chunk)
            if len(shell.written) > echoed:
                shell.say(bytes(len(shell.written) - echoed))
                echoed = len(shell.written)
            while not page.client.heard.empty():
                message = page.client.heard.get_nowait()
                if "text" in message:
                    took += int(message["text"].removeprefix('{"took": ').removesuffix("}"))
                else:
                    shown += len(message["bytes"])
                    page.controls(ack=len(message["bytes"]))
            await asyncio.sleep(0)


async def test_the_output_of_a_flood_is_slowed_so_that_others_are_served(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    # The burst is worth more seconds than any machine has been up: the clock counts from its start.
    has_terms(harness, window_bytes=1 << 40, bytes_a_second=1e-6, burst_bytes=1000)
    async with terminal(harness, rental_id) as (page, shell):
        for _ in range(20):
            shell.say(bytes(100))
        await turns(lambda: page.client.heard.qsize() == 11, "the burst passes")
        for _ in range(20):
            await asyncio.sleep(0)
        assert shell.read_so_far == 1100


# Ends and interruptions


async def test_the_end_of_a_shell_ends_the_terminal_with_its_status(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with terminal(harness, rental_id) as (page, shell):
        shell.end("the shell has ended with status 3")
        assert await page.is_closed() == (1000, "the shell has ended with status 3")


async def test_when_a_rental_is_taken_over_the_page_waits_and_gets_a_new_shell(harness: Harness) -> None:
    first, rental_id = await rented(harness)
    second = await harness.join()
    harness.end_the_brake_of_the_start()
    async with terminal(harness, rental_id) as (page, shell):
        first.die()
        await harness.silence(first, 100)
        await harness.pass_time(10)
        page.types(b"rm -rf half a comm")
        assert "left its worker" in await page.sees("waiting")
        await page.sees("connected")
        again = harness.shells.opened[-1]
        assert (shell.closed, again.closed) == (True, False)
        assert (again.host.worker_id, again.login.epoch) == (second.worker_id, 2)
        page.types(b"ls\n")
        await turns(lambda: b"ls" in again.written, "it is typed there")
    await harness.manager.sessions.flush()
    kinds = [event["kind"] for event in await harness.events("rental.session")]
    assert kinds == ["rental.session_opened", "rental.session_closed"] * 2


async def test_input_without_a_shell_is_dropped(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    has_terms(harness, again_after_s=0.05)
    async with terminal(harness, rental_id) as (page, shell):
        harness.shells.refusing = "the worker does not answer"
        shell.end(None)
        assert "broke" in await page.sees("waiting")
        assert "does not answer" in await page.sees("waiting")
        page.types(bytes(REPORT_INPUT_BYTES))
        while "took" not in await page.control():
            pass
        harness.shells.refusing = ""
        while (await page.control())["state"] != "connected":
            pass
        assert bytes(harness.shells.opened[-1].written) == b""


async def test_a_release_ends_the_terminal_with_the_reason(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with terminal(harness, rental_id) as (page, shell):
        await harness.as_admin.delete(f"/api/rentals/{rental_id}")
        await harness.settle()
        assert await page.sees("waiting")
        code, words = await page.is_closed()
    assert (code, shell.closed) == (4000, True)
    assert "releas" in words


async def test_a_terminal_ends_at_the_moment_at_which_its_token_ends(harness: Harness, short: Short) -> None:
    client, rental_id = await rented_by(harness, short)
    async with opening(harness, rental_id, await ticket(client, rental_id)) as page:
        await is_connected(page)
        await short.ends()
        code, words = await page.is_closed()
    assert (code, harness.shells.opened[-1].closed) == (4000, True)
    assert words == short.reason


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"idle_s": 0.05}, "nothing was typed or shown for 0.05 s"),
        ({"total_s": 0.05}, "a terminal stays open for 0.05 s at most"),
    ],
)
async def test_a_terminal_whose_time_is_over_ends_with_the_reason(
    harness: Harness, terms: dict[str, float], words: str
) -> None:
    _, rental_id = await rented(harness)
    has_terms(harness, **terms)
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id)) as page:
        assert await page.client.is_in()
        while (control := await page.control())["state"] != "ended":
            pass  # its progress by then does not matter
        assert control["message"] == words
        closed = await page.client.hears()
        assert (closed["code"], closed["reason"]) == (4002, words)
        await page.client.ended()
    assert all(shell.closed for shell in harness.shells.opened)


async def test_a_page_that_stops_reading_is_disconnected_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CLOSE_TIMEOUT_S", 0.01)
    controls: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    controls.put_nowait({"type": "websocket.connect"})
    sent: list[str] = []

    async def send(message: MutableMapping[str, object]) -> None:
        sent.append(str(message["type"]))
        if message["type"] != "websocket.accept":
            await asyncio.Event().wait()

    async def visits(page: TerminalPage) -> Ending:
        while True:
            await page.show(b"x")

    websocket = WebSocket({"type": "websocket", "headers": []}, controls.get, send)
    await websocket.accept()
    page = TerminalPage(websocket=websocket, terms=Terms(idle_s=0.01))
    ending = await asyncio.wait_for(serve(page, visits(page)), 20)
    assert ending.code == TIME_OVER
    assert sent == ["websocket.accept", "websocket.send", "websocket.send"], "one block, and the last control message"


async def test_a_page_that_leaves_leaves_nothing_behind(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    async with terminal(harness, rental_id) as (page, shell):
        await page.client.leave()
    assert shell.closed
    assert harness.manager.sessions.inside == 0
    assert harness.manager.terminals._open.total() == 0


async def test_a_page_that_leaves_while_its_shell_is_opened_leaves_none(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rental_id = await rented(harness)
    at_it, may_go_on, open_one = asyncio.Event(), asyncio.Event(), harness.shells.open

    async def slowly(*arguments: object) -> object:
        at_it.set()
        try:
            await may_go_on.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # the shell was opened at the same moment
        return await open_one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(harness.shells, "open", slowly)
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id)) as page:
        await at_it.wait()
        await page.client.leave()
        await turns(lambda: harness.shells.opened and harness.shells.opened[0].closed, "it is closed")


@pytest.mark.parametrize(
    ("limit", "most", "status", "words"),
    [
        ("MOST_OF_A_RENTAL", 2, 429, "the rental has 2"),
        ("MOST_OF_ALL", 4, 429, "admin has 2"),
    ],
)
async def test_terminals_have_limits_with_their_reason(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, limit: str, most: int, status: int, words: str
) -> None:
    monkeypatch.setattr(tickets, limit, most)
    _, rental_id = await rented(harness)
    left_over = await ticket(harness.as_admin, rental_id)
    async with AsyncExitStack() as both:
        for _ in range(2):
            await both.enter_async_context(terminal(harness, rental_id))
        refused = await harness.as_admin.post(f"/api/rentals/{rental_id}/terminal")
        assert (refused.status_code, refused.json()["code"]) == (status, "too_many_terminals")
        assert words in refused.json()["detail"]
        assert refused.headers["retry-after"]
        async with opening(harness, rental_id, left_over) as page:
            assert (await page.client.refusal())["status"] == status
    assert await ticket(harness.as_admin, rental_id)


async def test_an_owner_of_many_terminals_leaves_half_of_them_to_others(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "MOST_OF_ALL", 2)
    _, rental_id = await rented(harness)
    terminals = harness.manager.terminals
    async with AsyncExitStack() as both:
        await both.enter_async_context(terminal(harness, rental_id))
        terminals.check(rental_id, "other")
        with terminals.opened(rental_id, "other"):
            refused = await harness.as_admin.post(f"/api/rentals/{rental_id}/terminal")
            assert (refused.status_code, refused.json()["code"]) == (503, "too_many_terminals")
            assert "has 2 open browser terminals" in refused.json()["detail"]
        terminals.check(rental_id, "other")
    assert await ticket(harness.as_admin, rental_id)


async def test_a_terminal_has_two_events_and_a_log_line_without_its_content(harness: Harness) -> None:
    _, rental_id = await rented(harness)
    with capture_logs() as logs:
        async with terminal(harness, rental_id) as (page, shell):
            page.types(b"secret")
            await turns(lambda: shell.written, "it is typed")
            shell.say(b"secret answer")
            await page.shown()
            await page.client.leave()
    await harness.manager.sessions.flush()
    opened, closed = await harness.events("rental.session")
    assert opened["details"]["by"] == closed["details"]["by"] == "browser terminal"
    assert (opened["actor"], opened["details"]["from"]) == ("admin", "198.51.100.7")
    assert (closed["details"]["bytes_to_worker"], closed["details"]["bytes_to_client"]) == (6, 13)
    assert [line["event"] for line in logs] == ["terminal ended"]
    assert "secret" not in f"{opened}{closed}{logs}"
