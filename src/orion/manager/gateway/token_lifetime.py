"""What a token has opened ends with the token: streams of events, calls that wait, sessions, terminals.

    async with openings.by(principal) as opening:     # raises 401 where the token is over by now
        ...                                           # opening.over is done as soon as the token is over

A revocation is heard when it is committed. The end of a token's time is a timer of the opening's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import ContentStream, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from orion.manager.domain.steps import Event
from orion.manager.refusals import unauthorized
from orion.manager.store import tokens
from orion.manager.store.database import Store
from orion.manager.store.tokens import Principal

LOOK_AGAIN_S = 30.0
"""The longest that a timer runs before it looks at the clock again, which may have been corrected meanwhile."""
LAST_WORD_S = 1.0
"""A reader that takes nothing does not even take the end of a stream: then its connection is cut."""

HAS_BEEN_REVOKED = "the token by which it was opened has been revoked"
HAS_ENDED = "the time of the token by which it was opened is over"


@dataclass(eq=False)
class TokenUse:
    """One thing that a token has opened."""

    over: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the token is over; the result says why."""

    def end(self, reason: str) -> None:
        if not self.over.done():
            self.over.set_result(reason)

    def check(self) -> None:
        """Raise 401 if the token is over."""
        if self.over.done():
            raise unauthorized(self.over.result())

    def wakes(self, waiting: asyncio.Event) -> None:
        """Set the event, too, when the token is over."""
        self.over.add_done_callback(lambda _: waiting.set())


class TokenUses:
    def __init__(self, store: Store, wall: Callable[[], float]) -> None:
        """`wall`: Unix time, by the clock that tokens end by."""
        self._store = store
        self._wall = wall
        self._open: dict[str, set[TokenUse]] = {}
        """By the token's id."""
        store.news.follow(self.hear)

    @asynccontextmanager
    async def by(self, principal: Principal) -> AsyncIterator[TokenUse]:
        """Keep account of one thing that the principal's token opens. Raises ApiProblem if that token is over."""
        opening = TokenUse()
        its = self._open.setdefault(principal.id, set())
        its.add(opening)
        timer: list[asyncio.TimerHandle] = []
        try:
            # Only now: a revocation that came before the line above was not heard by this opening.
            known = await self._store.read(tokens.named, principal.role, principal.id, self._wall())
            if known is None or known.mark != principal.mark:
                raise unauthorized()
            if known.expires_at is not None:
                self._end_in_time(opening, known.expires_at, timer)
            yield opening
        finally:
            for handle in timer:
                handle.cancel()
            its.discard(opening)
            if not its and self._open.get(principal.id) is its:
                del self._open[principal.id]

    def hear(self, committed: Sequence[Event]) -> None:
        """End what was opened by the tokens that these events revoke."""
        for event in committed:
            if event.kind == tokens.REVOKED:
                for opening in self._open.get(str(event.details["token_id"]), ()):
                    opening.end(HAS_BEEN_REVOKED)

    def _end_in_time(self, opening: TokenUse, expires_at: float, timer: list[asyncio.TimerHandle]) -> None:
        left_s = expires_at - self._wall()
        if left_s <= 0:
            opening.end(HAS_ENDED)
            return
        again = asyncio.get_running_loop().call_later(
            min(left_s, LOOK_AGAIN_S), self._end_in_time, opening, expires_at, timer
        )
        timer[:] = [again]


class Streamed(StreamingResponse):
    """A streamed answer that is cut when the token of whoever asked is over, also while its reader takes nothing.

    `last_word` is sent before a stream without a stated length is closed; an answer with a length is broken off, so
    that nobody takes a part for the whole. `place` is entered before anything is sent, and may refuse.
    """

    def __init__(
        self,
        content: ContentStream,
        token_uses: TokenUses,
        principal: Principal,
        media_type: str,
        headers: dict[str, str],
        last_word: str | None = None,
        place: AbstractContextManager[None] | None = None,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._openings = token_uses
        self._principal = principal
        self._last_word = last_word
        self._place = place or nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        with self._place:
            async with self._openings.by(self._principal) as opening:
                opening.check()
                sending = asyncio.create_task(super().__call__(scope, receive, noted))
                try:
                    waiting: set[asyncio.Future[Any]] = {sending, opening.over}
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if sending.done():
                        sending.result()
                        return
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
        if started and self._last_word is not None:
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(LAST_WORD_S):
                    await send({"type": "http.response.body", "body": self._last_word.encode(), "more_body": False})
