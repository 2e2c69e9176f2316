"""What a worker may say to Mitogen in the engine; with a real child: tests/integration/test_engine_mitogen.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mitogen.core import (
    ADD_ROUTE,
    ALLOCATE_ID,
    CALL_FUNCTION,
    CALL_SERVICE,
    DEL_ROUTE,
    DETACHING,
    FORWARD_LOG,
    GET_MODULE,
    GET_RESOURCE,
    LOAD_MODULE,
    SHUTDOWN,
    STUB_CALL_SERVICE,
)

from orion.manager.engine.mitogen import Guard

ENGINE, TASK, WORKER, OTHER = 0, 3, 5, 6
GRANTED = range(1000, 2000)
REPLY = 1234


class Router:
    """Of Mitogen, as far as the guard touches it; keeps what gets through."""

    def __init__(self) -> None:
        self.through: list[Any] = []
        self.handlers: dict[int, Any] = {}
        self.streams = {number: stream(number) for number in (WORKER, OTHER)}
        self.id_allocator = SimpleNamespace(allocate_block=lambda: (GRANTED.start, GRANTED.stop))

    def _async_route(self, message: Any, stream: Any = None) -> None:
        self.through.append(message)

    def add_handler(self, handler: Any, handle: int, overwrite: bool) -> None:
        self.handlers[handle] = handler

    def stream_by_id(self, number: int) -> Any:
        return self.streams.get(number)


def stream(number: int, authority: int | None = None) -> Any:
    class Stream:
        protocol = SimpleNamespace(remote_id=number, auth_id=authority)

    return Stream()


def message(handle: int, to: int = ENGINE, source: int = WORKER, authority: int = WORKER, data: bytes = b"") -> Any:
    return SimpleNamespace(
        handle=handle, dst_id=to, src_id=source, auth_id=authority, data=data, is_dead=False, reply=lambda _: None
    )


@pytest.fixture
def router() -> Router:
    return Router()


def gets_through(router: Router, sent: Any) -> bool:
    guard = Guard(router)
    guard._allocate(message(ALLOCATE_ID))
    guard.route(sent, router.streams[WORKER])
    return sent in router.through


@pytest.mark.parametrize(
    "sent",
    [
        message(GET_MODULE),
        message(FORWARD_LOG),
        message(ALLOCATE_ID),
        message(REPLY),
        message(REPLY, to=TASK),
        message(ADD_ROUTE, data=b"1000:a process of its own"),
        message(DEL_ROUTE, data=b"1999"),
        message(REPLY, to=TASK, source=1000, authority=1000),
    ],
)
def test_what_a_task_needs_gets_through(router: Router, sent: Any) -> None:
    assert gets_through(router, sent)


@pytest.mark.parametrize("handle", [CALL_FUNCTION, CALL_SERVICE, STUB_CALL_SERVICE, GET_RESOURCE, DETACHING, SHUTDOWN])
@pytest.mark.parametrize("to", [ENGINE, TASK, OTHER])
def test_no_other_service_is_for_a_worker(router: Router, handle: int, to: int) -> None:
    assert not gets_through(router, message(handle, to=to))


@pytest.mark.parametrize("to", [TASK, OTHER])
@pytest.mark.parametrize("handle", [GET_MODULE, FORWARD_LOG, ADD_ROUTE, LOAD_MODULE])
def test_the_services_are_the_engine_s_alone(router: Router, handle: int, to: int) -> None:
    assert not gets_through(router, message(handle, to=to, data=b"1000:x"))


@pytest.mark.parametrize(("source", "authority"), [(ENGINE, ENGINE), (WORKER, ENGINE), (OTHER, OTHER), (2000, 2000)])
@pytest.mark.parametrize("handle", [REPLY, GET_MODULE, CALL_SERVICE])
def test_nobody_speaks_for_another(router: Router, handle: int, source: int, authority: int) -> None:
    assert not gets_through(router, message(handle, source=source, authority=authority))


@pytest.mark.parametrize("data", [b"0:engine", b"6:other", b"2000:x", b"-1:x", b"", b":x", b"\xd9\xa0:x", b" 1000:x"])
@pytest.mark.parametrize("handle", [ADD_ROUTE, DEL_ROUTE])
def test_no_route_is_announced_but_to_a_process_of_one_s_own(router: Router, handle: int, data: bytes) -> None:
    assert not gets_through(router, message(handle, data=data))


def test_the_engine_s_own_processes_are_not_held_up(router: Router) -> None:
    sent = message(CALL_SERVICE, source=TASK, authority=TASK)
    Guard(router).route(sent, stream(TASK, authority=ENGINE))
    Guard(router).route(message(CALL_FUNCTION, to=WORKER, source=ENGINE, authority=ENGINE))
    assert sent in router.through
    assert router.through[-1].dst_id == WORKER
