"""The manager asks itself through the proxy, because nobody's silence means anything while nobody can get through."""

from __future__ import annotations

import httpx

from orion.manager.controllers.loop import Loop


class ProxyProbe:
    def __init__(self, url: str, timeout_s: float, interval_s: float) -> None:
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False)
        self._url = url
        self.open = True
        """Whether the last question was answered; true before the first, for the brake holds at the start anyway."""
        self.loop = Loop("door", interval_s, self.ask)

    async def ask(self) -> None:
        try:
            self.open = (await self._client.get(self._url)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            self.open = False

    async def close(self) -> None:
        await self._client.aclose()
