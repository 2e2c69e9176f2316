"""The answers of the port proxy to requests that it does not carry."""

from __future__ import annotations

import html
import json

PROXY_MARK = b"X-Orion-Door: 1\r\n"
"""A header that tells the proxy that an answer came from here (web_port.js; a released name)."""
NOT_THE_PROXY = "this port is for the platform's proxy alone"
_TITLES = {400: "Bad Request", 403: "Forbidden", 502: "Bad Gateway", 503: "Service Unavailable"}


class PortRefusal(Exception):
    """The port proxy does not carry a request. The text and `code` are for the client."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code


def wants_html(head: bytes) -> bool:
    return any(line.lower().startswith(b"accept:") and b"text/html" in line.lower() for line in head.split(b"\r\n"))


def refusal_response(refusal: PortRefusal, as_html: bool) -> bytes:
    title, detail = _TITLES[refusal.status], str(refusal)
    if as_html:
        kind = "text/html; charset=utf-8"
        body = f"<!doctype html><title>{title}</title><h1>{title}</h1><p>{html.escape(detail)}</p>\n"
    else:
        kind = "application/problem+json"
        problem = {"type": "about:blank", "title": title, "status": refusal.status, "code": refusal.code}
        body = json.dumps(problem | {"detail": detail})
    lines = [f"HTTP/1.1 {refusal.status} {title}", PROXY_MARK.decode().strip(), "Cache-Control: no-store"]
    lines += ["Connection: close", f"Content-Type: {kind}", f"Content-Length: {len(body.encode())}"]
    lines += ["Retry-After: 2"] if refusal.status == 503 else []
    return ("\r\n".join([*lines, "", ""]) + body).encode()
