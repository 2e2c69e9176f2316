"""HTTP requests to the platform, sent again where that is safe. Only this module handles httpx's errors."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import httpx
from pydantic import BaseModel

from orion import __version__
from orion.errors import OrionError, Retryable, UnreadableReply, no_reply, refusal
from orion.login import Login, proxy_for, tls_context

CONNECT_S = 5.0  # seconds to wait for a connection
ANSWER_S = 20.0  # seconds to wait for a reply, besides the call's own `wait_s`: more than the limits of the platform
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.3, 5.0  # seconds between two attempts: after the first failure, and at most

OnRetry = Callable[[Retryable, float], None]  # a function that gets the error and the seconds of the pause that follows


def backoff_s(failures: int) -> float:
    """Return a pause that doubles from FIRST_PAUSE_S to LONGEST_PAUSE_S. Half of it is random, to spread clients."""
    whole: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 10))
    return whole * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it


class HttpTransport:
    """The sender of one login's requests. Tests set `http`, `sleep` and `clock`."""

    def __init__(
        self,
        login: Login,
        *,
        http: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = login.url
        self.sleep = sleep
        self.clock = clock
        self.on_retry: OnRetry = lambda _error, _pause: None
        self.patience_s = 0.0  # seconds for which every GET is sent again at least, as it changes nothing
        self._client = httpx.Client(
            base_url=login.url,
            headers={"Authorization": f"Bearer {login.token}", "User-Agent": f"orion/{__version__}"},
            transport=http,
            verify=tls_context(login),
            proxy=proxy_for(login.url),
            # httpx must not read the environment: a .netrc could replace the token. proxy_for and tls_context read it.
            trust_env=False,
            follow_redirects=False,
        )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | float | None] | None = None,
        body: BaseModel | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        retry_for_s: float = 0.0,
    ) -> httpx.Response:
        """Send a request and return a successful reply. Repeat it for `retry_for_s` after a retryable error."""
        request = self._client.build_request(
            method,
            path,
            params={key: value for key, value in (params or {}).items() if value is not None},
            content=body.model_dump_json(exclude_unset=True) if body is not None else None,
            headers={**({"Content-Type": "application/json"} if body is not None else {}), **(headers or {})},
            timeout=httpx.Timeout(CONNECT_S, read=wait_s + ANSWER_S, write=ANSWER_S),
        )
        failures, give_up_at = 0, 0.0
        if method == "GET":
            retry_for_s = max(retry_for_s, self.patience_s)
        while True:
            try:
                return self._once(request)
            except Retryable as error:
                failures += 1
                give_up_at = give_up_at or self.clock() + retry_for_s
                self.pause(error, failures, give_up_at)

    def pause(self, error: Retryable, failures: int, give_up_at: float) -> None:
        """Pause as long as the server asked, else back off. Raise the error if that ends after `give_up_at`."""
        pause = error.retry_after_s if error.retry_after_s is not None else backoff_s(failures)
        if self.clock() + pause > give_up_at:
            raise error
        self.on_retry(error, pause)
        self.sleep(pause)

    def upload(self, path: str, file: IO[bytes], media_type: str, wait_s: float) -> httpx.Response:
        """Send a file in parts, once, and return a successful reply. Raise OrionError."""
        headers = {"Content-Type": media_type, "Content-Length": str(os.fstat(file.fileno()).st_size)}
        timeout = httpx.Timeout(CONNECT_S, read=wait_s + ANSWER_S, write=ANSWER_S)
        return self._once(self._client.build_request("POST", path, content=file, headers=headers, timeout=timeout))

    @contextmanager
    def stream(
        self, path: str, params: Mapping[str, str | float | None], headers: Mapping[str, str], silence_s: float
    ) -> Iterator[Iterator[bytes]]:
        """Yield the body of a reply as it comes. Raise Unreachable after a silence of `silence_s` seconds."""
        query = {key: value for key, value in params.items() if value is not None}
        timeout = httpx.Timeout(CONNECT_S, read=silence_s, write=ANSWER_S)
        try:
            with self._client.stream("GET", path, params=query, headers=dict(headers), timeout=timeout) as response:
                if not response.is_success:
                    raise refusal(response.status_code, response.headers, response.read())
                yield response.iter_bytes()
        except httpx.HTTPError as error:
            raise self._failure(error) from error

    def _once(self, request: httpx.Request) -> httpx.Response:
        try:
            response = self._client.send(request)
        except httpx.DecodingError as error:
            raise UnreadableReply(f"{self.url} sent a reply that cannot be decoded: {error}") from error
        except httpx.HTTPError as error:
            raise self._failure(error) from error
        if response.is_redirect:
            location = response.headers.get("Location")
            raise UnreadableReply(f"{self.url} redirects to {location}. Log in to that address instead")
        if not response.is_success:
            raise refusal(response.status_code, response.headers, response.content)
        return response

    def _failure(self, error: httpx.HTTPError) -> OrionError:
        if isinstance(error, httpx.TimeoutException):
            return no_reply(self.url, TimeoutError())
        if isinstance(error, httpx.RemoteProtocolError):
            return no_reply(self.url, ConnectionResetError())
        return no_reply(self.url, error)
