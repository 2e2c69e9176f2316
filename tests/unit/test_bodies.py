"""How the manager reads the bodies of requests: in time, and large or slow ones from known callers only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from orion.manager.api.bodies import LARGE_BYTES, Bodies
from orion.manager.authentication import Authentication
from orion.manager.store import tokens
from orion.manager.store.tokens import Principal

TOKEN = "a-token"
LARGE = str(LARGE_BYTES + 1)


class Store:
    """Knows one token."""

    async def read(self, query: Callable[..., Any], token: str, *_: float) -> Principal | str | None:
        if query is tokens.why_refused:
            return "this token is not known here"
        return Principal(role="client", id="alice", name="alice") if token == TOKEN else None


class ScriptedCall:
    """A request of which `parts` of the body arrive and then nothing more, and the manager's answer."""

    def __init__(self, path: str, headers: dict[str, str], parts: list[bytes]) -> None:
        known: Any = Store()
        services = {Authentication: Authentication(known, lambda: 1.0)}
        app = SimpleNamespace(state=SimpleNamespace(services=services))
        raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": raw_headers, "app": app}
        self.whole = int(headers.get("content-length", 1 << 30))
        self.parts = parts
        self.taken = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self.taken == len(self.parts):
            await asyncio.Event().wait()
        part, self.taken = self.parts[self.taken], self.taken + 1
        more = sum(map(len, self.parts[: self.taken])) < self.whole
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def answer(self) -> tuple[int, str]:
        """Return the status, and the code of a problem or the body of any other answer."""
        body = b"".join(message.get("body", b"") for message in self.sent)
        status = next(message["status"] for message in self.sent if message["type"] == "http.response.start")
        return status, json.loads(body)["code"] if body.startswith(b"{") else body.decode()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body, also when the client hangs up before its end, as FastAPI does."""
    try:
        content, status = str(len(await Request(scope, receive).body())), 200
    except ClientDisconnect:
        content, status = "gone", 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": content.encode()})


async def answered(call: ScriptedCall, whole_within_s: float = 60.0, unknown_within_s: float = 60.0) -> tuple[int, str]:
    async with asyncio.timeout(10):  # so that a body without a limit fails a test, and does not stop all tests
        await Bodies(echo, whole_within_s, unknown_within_s)(call.scope, call.receive, call.send)
    return call.answer


@pytest.mark.parametrize("parts", [[b"abcd"], [b"ab", b"c", b"d"]])
async def test_a_body_that_is_whole_in_time_reaches_the_route(parts: list[bytes]) -> None:
    assert await answered(ScriptedCall("/api/rent", {"content-length": "4"}, parts)) == (200, "4")


async def test_a_body_that_is_not_whole_in_time_ends_the_request() -> None:
    sent = {"content-length": "4", "authorization": f"Bearer {TOKEN}"}
    call = ScriptedCall("/api/rent", sent, [b"a", b"b"])
    assert await answered(call, 0.02, 0.01) == (408, "request_timeout")
    assert len([message for message in call.sent if message["type"] == "http.response.start"]) == 1


@pytest.mark.parametrize("token", ["", "Bearer orion_client_x_unknown"])
async def test_a_slow_body_of_an_unknown_caller_is_not_waited_for(token: str) -> None:
    call = ScriptedCall("/api/rent", {"content-length": "4", "authorization": token}, [b"a", b"b"])
    assert await answered(call, unknown_within_s=0.01) == (401, "unauthorized")
    assert len([message for message in call.sent if message["type"] == "http.response.start"]) == 1


@pytest.mark.parametrize("sent", [{"content-length": LARGE}, {"transfer-encoding": "chunked"}])
@pytest.mark.parametrize("token", ["", "Bearer orion_client_x_unknown", "Basic YTpi"])
async def test_no_byte_of_a_large_body_of_an_unknown_caller_is_read(sent: dict[str, str], token: str) -> None:
    call = ScriptedCall("/api/rent", sent | {"authorization": token}, [b"a"])
    assert await answered(call) == (401, "unauthorized")
    assert call.taken == 0


async def test_a_large_body_of_a_known_caller_is_read() -> None:
    sent = {"content-length": LARGE, "authorization": f"Bearer {TOKEN}"}
    call = ScriptedCall("/api/rent", sent, [b"a" * int(LARGE)])
    assert await answered(call) == (200, LARGE)


async def test_a_body_of_the_largest_size_for_unknown_callers_is_read() -> None:
    call = ScriptedCall("/api/rent", {"content-length": str(LARGE_BYTES)}, [b"a" * LARGE_BYTES])
    assert await answered(call) == (200, str(LARGE_BYTES))


async def test_the_upload_of_a_backup_may_be_slow() -> None:
    call = ScriptedCall("/api/admin/restore", {"content-length": "2"}, [b"a"])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await answered(call, 0.01)
    assert not call.sent


async def test_an_answer_that_was_sent_before_the_body_ended_stays() -> None:
    async def hasty(_: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"first"})

    call = ScriptedCall("/api/rent", {"content-length": "2"}, [])
    await Bodies(hasty, 0.01, 0.005)(call.scope, call.receive, call.send)
    assert call.answer == (200, "first")
