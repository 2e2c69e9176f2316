"""The uses of a token that last: event streams, waiting calls, sessions and terminals. They end with the token.

    async with token_uses.by(principal) as use:     # raises 401 if the token is over
        ...                                         # use.over is done as soon as the token is over

A revocation ends them when it is committed; a timer of each use ends it when the token expires.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field

from starlette.responses import ContentStream, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from orion.manager.domain.steps import Event
from orion.manager.gateway.relay import run_until_first
from orion.manager.refusals import unauthorized
from orion.manager.store import tokens
from orion.manager.store.database import Store
from orion.manager.store.tokens import Principal

LOOK_AGAIN_S = 30.0
"""The longest time in seconds until a timer reads the clock again, because the clock may be corrected meanwhile."""
LAST_CHUNK_TIMEOUT_S = 1.0
"""Seconds for the end of a stream to be sent; the connection of a client that does not read is then cut."""

HAS_BEEN_REVOKED = "the token by which it was opened has been revoked"
HAS_ENDED = "the time of the token by which it was opened is over"


@dataclass(eq=False)
class TokenUse:
    """One use of a token."""

    over: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """A future that is done when the token is over; its result says why."""

    def end(self, reason: str) -> None:
        if not self.over.done():
            self.over.set_result(reason)

    def check(self) -> None:
        """Raise 401 if the token is over."""
        if self.over.done():
            raise unauthorized(self.over.result())

    def wakes(self, waiting: asyncio.Event) -> None:
        """Set this event when the token is over."""
        self.over.add_done_callback(lambda _: waiting.set())


class TokenUses:
    def __init__(self, store: Store, wall: Callable[[], float]) -> None:
        """`wall` returns Unix time by the clock that tokens end by."""
        self._store = store
        self._wall = wall
        self._open: dict[str, set[TokenUse]] = {}
        """The uses by the token's id."""
        store.news.follow(self.on_commit)

    @asynccontextmanager
    async def by(self, principal: Principal) -> AsyncIterator[TokenUse]:
        """Register one use of the principal's token for a block. Raise ApiProblem if the token is over."""
        use = TokenUse()
        its = self._open.setdefault(principal.id, set())
        its.add(use)
        timer: list[asyncio.TimerHandle] = []
        try:
            # The token is read after the use was added, so a revocation either ends the use or shows here.
            known = await self._store.read(tokens.named, principal.role, principal.id, self._wall())
            if known is None or known.mark != principal.mark:
                raise unauthorized()
            if known.expires_at is not None:
                self._end_in_time(use, known.expires_at, timer)
            yield use
        finally:
            for handle in timer:
                handle.cancel()
            its.discard(use)
            if not its and self._open.get(principal.id) is its:
                del self._open[principal.id]

    def on_commit(self, committed: Sequence[Event]) -> None:
        """End the uses of the tokens that these events revoke."""
        for event in committed:
            if event.kind == tokens.REVOKED:
                for use in self._open.get(str(event.details["token_id"]), ()):
                    use.end(HAS_BEEN_REVOKED)

    def _end_in_time(self, use: TokenUse, expires_at: float, timer: list[asyncio.TimerHandle]) -> None:
        left_s = expires_at - self._wall()
        if left_s <= 0:
            use.end(HAS_ENDED)
            return
        loop = asyncio.get_running_loop()
        timer[:] = [loop.call_later(min(left_s, LOOK_AGAIN_S), self._end_in_time, use, expires_at, timer)]


class Streamed(StreamingResponse):
    """A streamed reply that is cut when its token is over, also while the client reads nothing.

    `last_chunk` is sent before a stream without a Content-Length is closed; a reply with a length is broken off, so
    that no client takes a part for the whole. `while_open` is entered before the reply begins; it may raise ApiProblem.
    """

    def __init__(
        self,
        content: ContentStream,
        *,
        token_uses: TokenUses,
        principal: Principal,
        media_type: str,
        headers: dict[str, str],
        last_chunk: str | None = None,
        while_open: AbstractContextManager[None] | None = None,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._token_uses = token_uses
        self._principal = principal
        self._last_chunk = last_chunk
        self._while_open = while_open or nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        with self._while_open:
            async with self._token_uses.by(self._principal) as use:
                use.check()
                first, *_ = await run_until_first([super().__call__(scope, receive, noted)], use.over)
                if first is not use.over:
                    first.result()
                    return
        if started and self._last_chunk is not None:
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(LAST_CHUNK_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": self._last_chunk.encode(), "more_body": False})
