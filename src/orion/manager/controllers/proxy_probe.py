"""The proxy probe: a request of the manager to itself through the proxy, without which workers cannot be heard."""

from __future__ import annotations

import httpx

from orion.manager.controllers.loop import Loop


class ProxyProbe:
    def __init__(self, url: str, timeout_s: float, interval_s: float) -> None:
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False)
        self._url = url
        self.answers = True
        """Whether the last request was answered; true before the first, because the brake is on at the start anyway."""
        self.loop = Loop("door", interval_s, self.ask)  # the name is a label of released metrics

    async def ask(self) -> None:
        try:
            self.answers = (await self._client.get(self._url)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            self.answers = False

    async def close(self) -> None:
        await self._client.aclose()
