"""What root on a worker could have its interpreter say to Mitogen in the engine: see test_engine_mitogen.py."""

from __future__ import annotations

from typing import Any

import mitogen.core
from mitogen.core import ADD_ROUTE, CALL_SERVICE, Message

FILE_SERVICE = "mitogen.service.FileService"


@mitogen.core.takes_econtext
def tell(messages: list[dict[str, Any]], econtext: Any) -> None:
    """Sends these as they are, whatever they claim."""
    protocol = econtext.router.stream_by_id(0).protocol
    for each in messages:
        message = Message(**each)
        protocol._router.broker.defer(protocol._send, message)


def a_route_to_the_engine(me: int) -> dict[str, Any]:
    return {"dst_id": 0, "src_id": me, "auth_id": me, "handle": ADD_ROUTE, "data": b"0:worker"}


def let_me_have(path: str) -> dict[str, Any]:
    """With the engine's own authority: the file may be fetched by any worker from then on."""
    call = Message.pickled((FILE_SERVICE, "register", {"path": path}))
    return {"dst_id": 0, "src_id": 0, "auth_id": 0, "handle": CALL_SERVICE, "data": bytes(call.data)}
