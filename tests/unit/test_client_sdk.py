"""The SDK against a real HTTP server on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import pytest
from support.scripted_platform import Answer, ScriptedPlatform, event, page, problem, rental, stream, token, worker

from orion import errors
from orion.client.sdk import Orion
from orion.client.sse import messages
from orion.login import Login
from orion.wire import RentalState

TOKEN = "orion_client_t1_secret"


class RetryClock:
    """A clock that moves only during `sleep`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock() -> RetryClock:
    return RetryClock()


@pytest.fixture
def orion(platform: ScriptedPlatform, clock: RetryClock) -> Iterator[Orion]:
    with Orion(Login(platform.url, TOKEN), sleep=clock.sleep, clock=clock.read) as orion:
        yield orion


def test_every_call_carries_the_token(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals", page())
    list(orion.rentals())
    assert platform.calls[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_rent_sends_the_request_with_an_idempotency_key(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    rented = orion.rent(name="box", ttl_s=3600, labels={"team": "blue"}, wait_s=0)
    assert rented.state is RentalState.ACTIVE
    assert platform.calls[0].body == {"name": "box", "ttl_s": 3600, "labels": {"team": "blue"}, "wait_s": 0}
    assert len(platform.calls[0].headers["Idempotency-Key"]) >= 20


def test_two_rents_are_two_rentals(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    orion.rent()
    orion.rent()
    assert platform.calls[0].headers["Idempotency-Key"] != platform.calls[1].headers["Idempotency-Key"]


@pytest.mark.parametrize(
    "failure",
    [
        Answer(breaks=True),
        problem(502, "manager_unreachable", "try again", {"X-Orion-Manager": "unreachable"}),
        problem(504, "manager_unreachable", "try again", {"X-Orion-Manager": "unreachable"}),
        problem(504, "manager_no_answer", "nobody knows"),
        problem(429, "rate_limited", "slower"),
    ],
)
def test_a_rent_that_broke_is_repeated_with_the_same_key_and_body(
    platform: ScriptedPlatform, orion: Orion, failure: Answer
) -> None:
    platform.answer("POST", "/api/rent", failure, failure, Answer(201, rental()))
    assert orion.rent(name="box").id == "abcdefgh23"
    assert len(platform.calls) == 3
    assert len({call.headers["Idempotency-Key"] for call in platform.calls}) == 1
    assert platform.calls[0].body == platform.calls[2].body


def test_a_release_that_broke_is_repeated(platform: ScriptedPlatform, orion: Orion) -> None:
    gone = problem(502, "manager_no_answer", "nobody knows")
    platform.answer("DELETE", "/api/rentals/abcdefgh23", gone, Answer(breaks=True), rental(state="released"))
    assert orion.release("abcdefgh23").state is RentalState.RELEASED


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_an_unmarked_server_error_is_not_repeated(platform: ScriptedPlatform, orion: Orion, status: int) -> None:
    platform.answer("POST", "/api/rent", Answer(status, b"<html>", {"Content-Type": "text/html"}))
    with pytest.raises(errors.ServerFault):
        orion.rent()
    assert len(platform.calls) == 1


def test_retry_after_is_obeyed(platform: ScriptedPlatform, orion: Orion, clock: RetryClock) -> None:
    busy = problem(429, "rate_limited", "slower", {"Retry-After": "7"})
    platform.answer("POST", "/api/rent", busy, Answer(201, rental()))
    orion.rent()
    assert clock.slept == [7.0]


def test_retrying_ends(platform: ScriptedPlatform, orion: Orion, clock: RetryClock) -> None:
    platform.answer("POST", "/api/rent", Answer(breaks=True))
    with pytest.raises(errors.Unreachable):
        orion.rent(retry_for_s=10)
    assert 5 < sum(clock.slept) <= 10


def test_each_retry_is_reported(platform: ScriptedPlatform, orion: Orion, clock: RetryClock) -> None:
    waits: list[float] = []
    orion.when_retrying(lambda _error, pause: waits.append(pause))
    platform.answer("POST", "/api/rent", Answer(breaks=True), Answer(201, rental()))
    orion.rent()
    assert waits == clock.slept


def test_a_read_is_repeated_only_if_the_caller_requests_it(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/status", Answer(breaks=True))
    with pytest.raises(errors.Unreachable):
        orion.status()
    assert len(platform.calls) == 1


@pytest.mark.parametrize(
    ("status", "kind", "retryable", "exit_code"),
    [
        (401, errors.Unauthorized, False, 4),
        (403, errors.Forbidden, False, 4),
        (404, errors.NotFound, False, 3),
        (409, errors.Conflict, False, 6),
        (422, errors.InvalidRequest, False, 2),
        (413, errors.ApiError, False, 1),
        (429, errors.RateLimited, True, 1),
        (500, errors.ServerFault, False, 1),
    ],
)
def test_a_refusal_is_an_exception_with_the_problem_in_it(
    platform: ScriptedPlatform,
    orion: Orion,
    status: int,
    kind: type[errors.ApiError],
    retryable: bool,
    exit_code: int,
) -> None:
    platform.answer("GET", "/api/status", problem(status, "some_code", "do this", {"X-Request-ID": "req1"}))
    with pytest.raises(errors.ApiError) as caught:
        orion.status()
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.detail, error.request_id) == (status, "some_code", "do this", "req1")
    assert isinstance(error, errors.Retryable) is retryable
    assert error.exit_code == exit_code


def test_only_the_proxys_mark_makes_a_502_retryable() -> None:
    marked = errors.refusal(502, httpx.Headers({"x-orion-manager": "unreachable"}), b"")
    assert isinstance(marked, errors.Retryable)
    assert not isinstance(errors.refusal(502, httpx.Headers(), b""), errors.Retryable)
    assert not isinstance(errors.refusal(500, httpx.Headers({"x-orion-manager": "unreachable"}), b""), errors.Retryable)


def test_retry_after_may_be_a_date() -> None:
    headers = httpx.Headers({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT"})
    error = errors.refusal(429, headers, b"", datetime(2026, 10, 21, 7, 28, 0, tzinfo=UTC))
    assert error.retry_after_s == 30


def test_an_invalid_retry_after_is_ignored() -> None:
    assert errors.refusal(429, httpx.Headers({"Retry-After": "soon"}), b"").retry_after_s is None


def test_a_refused_connection_is_reported_with_advice() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound but not listening, so that no other program takes the port
        port = silent.getsockname()[1]
        with (
            Orion.at(f"http://127.0.0.1:{port}", TOKEN) as orion,
            pytest.raises(errors.Unreachable, match="make up") as caught,
        ):
            orion.status()
    assert "connection refused" in str(caught.value)


def test_another_service_at_the_address_is_recognised(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/status", Answer(body=b"<html>hello</html>"))
    with pytest.raises(errors.UnreadableReply, match="right address"):
        orion.status()


def test_a_redirect_is_not_followed_with_our_token(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/status", Answer(301, {}, {"Location": "https://elsewhere.example/"}))
    with pytest.raises(errors.UnreadableReply, match=r"elsewhere\.example"):
        orion.status()


def test_a_request_that_can_never_be_accepted_is_not_sent(platform: ScriptedPlatform, orion: Orion) -> None:
    with pytest.raises(errors.InvalidInput, match="ttl_s"):
        orion.rent(ttl_s=1)
    assert platform.calls == []


def test_a_list_is_read_page_by_page(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer(
        "GET", "/api/rentals", page(rental(id="a"), rental(id="b"), following="cursor"), page(rental(id="c"))
    )
    assert [one.id for one in orion.rentals(limit=2)] == ["a", "b", "c"]
    assert [call.query.get("after") for call in platform.calls] == [None, "cursor"]


def test_a_rental_is_found_by_id_before_its_name(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals/box", rental(id="box", name="other"))
    platform.answer("GET", "/api/rentals", page(rental(name="box")))
    assert orion.find_rental("box").name == "other"


def test_a_rental_is_found_by_name(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals", page(rental()))
    assert orion.find_rental("box").id == "abcdefgh23"
    assert platform.calls[-1].query == {"name": "box"}


def test_a_name_of_several_lists_them(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals", page(rental(id="one"), rental(id="two", owner="bob")))
    with pytest.raises(errors.Ambiguous, match="two of bob") as caught:
        orion.find_rental("box")
    assert caught.value.candidates == ["one", "two"]


def test_among_ended_rentals_of_one_name_the_latest_is_found(platform: ScriptedPlatform, orion: Orion) -> None:
    old = rental(id="old", state="released", created_at="2029-01-01T00:00:00Z")
    platform.answer("GET", "/api/rentals", page(), page(old, rental(id="new", state="expired")))
    assert orion.find_rental("box", ended=True).id == "new"


@pytest.mark.parametrize("name", ["../tokens", "a/b", "", "Box", "box?x=1"])
def test_an_impossible_name_is_not_sent(platform: ScriptedPlatform, orion: Orion, name: str) -> None:
    with pytest.raises(errors.NotFound):
        orion.find_rental(name)
    assert platform.calls == []


def test_an_id_cannot_leave_its_place_in_the_path(platform: ScriptedPlatform, orion: Orion) -> None:
    with pytest.raises(errors.NotFound):
        orion.revoke_token("../rentals/abc")
    assert platform.calls[0].path == "/api/tokens/..%2Frentals%2Fabc"


def test_a_worker_is_found_by_hostname_where_one_is_alive(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/workers", page(worker(id="w-old", health="down"), worker(id="w-new")))
    assert orion.find_worker("0123456789ab").id == "w-new"


def test_a_token_is_found_by_name_where_one_is_in_force(platform: ScriptedPlatform, orion: Orion) -> None:
    revoked = token(id="t0", revoked_at="2030-01-01T00:00:00Z")
    platform.answer("GET", "/api/tokens", page(revoked, token(id="t1")))
    assert orion.find_token("ada").id == "t1"


def test_waiting_ends_in_the_requested_state(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals/abcdefgh23", rental(state="queued"), rental(state="provisioning"), rental())
    seen: list[str] = []
    found = orion.wait_for("abcdefgh23", RentalState.ACTIVE, 60, lambda one: seen.append(one.state.value))
    assert found.state is RentalState.ACTIVE
    assert seen == ["queued", "provisioning", "active"]
    assert platform.calls[0].query == {"wait_s": "10.0", "state": "active"}


def test_waiting_ends_if_the_state_can_never_come(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals/abcdefgh23", rental(state="released"))
    assert orion.wait_for("abcdefgh23", RentalState.ACTIVE, 60).state is RentalState.RELEASED


def test_waiting_ends_in_time_without_a_tight_loop_of_requests(
    platform: ScriptedPlatform, orion: Orion, clock: RetryClock
) -> None:
    platform.answer("GET", "/api/rentals/abcdefgh23", rental(state="queued"))
    assert orion.wait_for("abcdefgh23", RentalState.ACTIVE, 5).state is RentalState.QUEUED
    assert sum(clock.slept) == pytest.approx(5)
    assert len(platform.calls) <= 11


def test_waiting_continues_through_an_outage(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/rentals/abcdefgh23", Answer(breaks=True), Answer(breaks=True), rental())
    assert orion.wait_for("abcdefgh23", RentalState.ACTIVE, 60).state is RentalState.ACTIVE


def test_a_stream_that_breaks_resumes_after_the_last_event(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/events", stream(event(4), event(5)), stream(event(5), event(6)))
    following = orion.follow_events(after=3)
    assert [next(following).id for _ in range(3)] == [4, 5, 6]
    assert [call.headers["Last-Event-ID"] for call in platform.calls] == ["3", "5"]


def test_a_stream_ends_when_its_time_is_over(platform: ScriptedPlatform, orion: Orion, clock: RetryClock) -> None:
    platform.answer("GET", "/api/events", stream(event(1)))
    assert [one.id for one in orion.follow_events(for_s=5)] == [1]
    assert clock.now >= 1005


def test_a_stream_that_was_never_open_is_an_error_at_once(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/events", Answer(breaks=True))
    with pytest.raises(errors.Unreachable):
        next(orion.follow_events())
    assert len(platform.calls) == 1


def test_a_stream_that_is_refused_is_not_repeated(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("GET", "/api/events", stream(event(1)), problem(401, "unauthorized", "revoked"))
    following = orion.follow_events()
    next(following)
    with pytest.raises(errors.Unauthorized):
        next(following)


def test_a_line_separator_inside_the_data_does_not_cut_it() -> None:
    whole = 'data: "a\u2028b\x0bc"\r\n\r\n: still here\n\ndata: last\n\n'.encode()
    one_by_one = [whole[at : at + 1] for at in range(len(whole))]
    assert list(messages(one_by_one)) == ['"a\u2028b\x0bc"', None, "last"]


def test_a_line_without_an_end_is_refused() -> None:
    with pytest.raises(errors.UnreadableReply):
        list(messages(b"x" * 65536 for _ in range(100)))


def test_a_release_is_waited_for(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("DELETE", "/api/rentals/abcdefgh23", rental(state="released"))
    assert orion.release("abcdefgh23", wait_s=30).state is RentalState.RELEASED
    assert platform.calls[0].query == {"wait_s": "30"}


def test_the_remaining_calls_use_the_paths_of_the_contract(platform: ScriptedPlatform, orion: Orion) -> None:
    platform.answer("POST", "/api/rentals/r/renew", rental())
    platform.answer("GET", "/api/workers/w", worker())
    platform.answer("POST", "/api/workers/w/drain", worker(intent="draining"))
    platform.answer("POST", "/api/workers/drain", {"items": [worker(intent="draining")], "next": None})
    platform.answer("POST", "/api/workers/w/resume", worker())
    platform.answer("DELETE", "/api/workers/w", Answer(204))
    platform.answer("POST", "/api/tokens", Answer(201, token() | {"token": TOKEN}))
    platform.answer("DELETE", "/api/tokens/t1", Answer(204))
    platform.answer("GET", "/healthz", {"status": "ok"})
    platform.answer("GET", "/api/openapi.json", {"openapi": "3.1.0"})
    assert orion.renew("r", 60).ttl_s == 86400
    assert orion.worker("w").id == orion.resume("w").id == orion.drain("w").id
    assert [one.intent for one in orion.drain_together(["w"])] == ["draining"]
    orion.remove_worker("w")
    assert orion.create_token("ada", ttl_s=60).token == TOKEN
    orion.revoke_token("t1")
    orion.healthz()
    assert orion.openapi() == {"openapi": "3.1.0"}
