"""A renter's web server for tests/e2e/test_web_ports.py, which runs in the rental: a page with all kinds of content."""

import base64
import hashlib
import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT = 8000
PAGE = b"""<!doctype html><title>loading</title><link rel="stylesheet" href="style.css"><body>
<img src="image.svg"><script src="script.js"></script>"""
SCRIPT = b"""
const attempt = async (what) => { try { return String(await what()); } catch (error) { return error.name; } };
const opened = (address) => new Promise((resolve) => {
  const socket = new WebSocket(address);
  socket.onopen = () => socket.send("echoed");
  socket.onmessage = ({ data }) => { resolve(data); socket.onclose = () => { document.title = "cut"; }; };
  socket.onerror = () => resolve("refused");
});
const here = new URL(".", location.href).href;
window.found = async () => JSON.stringify({
  origin: self.origin,
  data: await attempt(async () => (await fetch("data.json")).text()),
  posted: await attempt(async () => (await fetch("data.json", { method: "PUT", headers: { "X-Own": "1" } })).text()),
  socket: await opened(here.replace("http", "ws") + "socket"),
  coloured: getComputedStyle(document.body).color,
  image: document.images[0].naturalWidth,
  cookie: await attempt(() => document.cookie),
  storage: await attempt(() => { localStorage.a = 1; return localStorage.a; }),
});
window.tries = async (address) => JSON.stringify({
  fetched: await attempt(async () => (await fetch(address, { credentials: "include" })).text()),
  socket: await opened(address.replace("http", "ws") + "socket"),
  script: await new Promise((resolve) => {
    const one = document.createElement("script");
    [one.src, one.onload, one.onerror] = [address + "script.js", () => resolve("ran"), () => resolve("refused")];
    document.body.append(one);
  }),
  framed: await new Promise((resolve) => {
    const one = document.createElement("iframe");
    one.src = address;
    one.onload = () => resolve(attempt(() => one.contentDocument ? one.contentDocument.body.innerHTML : "closed"));
    document.body.append(one);
  }),
});
addEventListener("load", () => { document.title = "loaded"; });
"""
FILES = {
    "/": ("text/html", PAGE),
    "/style.css": ("text/css", b"body { color: rgb(1, 2, 3) }"),
    "/script.js": ("text/javascript", SCRIPT),
    "/image.svg": ("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg" width="7" height="7"/>'),
    "/data.json": ("application/json", b'"data"'),
    "/who": ("text/plain", socket.gethostname().encode()),
}


class PageHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with Path("seen.jsonl").open("a") as seen:
            seen.write(json.dumps([self.requestline, dict(self.headers)]) + "\n")
        if self.headers.get("Upgrade") == "websocket":
            return self.echo()
        kind, body = FILES.get(self.path, ("text/plain", b"nothing"))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Set-Cookie", "own=1; Path=/")
        self.end_headers()
        self.wfile.write(body)
        return None

    do_PUT = do_GET  # noqa: N815 - the name that http.server calls

    def echo(self) -> None:
        """Send back each short frame of a WebSocket (RFC 6455, 5.2)."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accepted = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()  # noqa: S324 - the protocol's
        self.wfile.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accepted.encode() + b"\r\n\r\n"
        )
        while len(head := self.rfile.read(6)) == 6:
            masked = self.rfile.read(head[1] & 127)
            body = bytes(one ^ head[2 + at % 4] for at, one in enumerate(masked))
            self.wfile.write(bytes([head[0], len(body)]) + body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing: the requests are recorded in a file."""


ThreadingHTTPServer(("127.0.0.1", PORT), PageHandler).serve_forever()
