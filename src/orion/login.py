"""The platform's address and the user's token for it, from a small file or from the environment.

This module uses the standard library only, as `orion.errors` does, and imports slow modules only where it needs them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    import ssl

from orion.errors import InvalidInput, LocalFault, NotLoggedIn

_HOW = "run: orion login http://localhost:8080"


class Login(NamedTuple):
    """The address of a platform and the token to use there."""

    url: str
    token: str
    ca_file: str | None = None
    """The file of the only certificate (or authority) to trust, in PEM; None means those that the system trusts."""

    def __repr__(self) -> str:
        return f"Login({self.url!r})"  # without the token, which must not get into a log


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of this user's login and keys."""
    base = environment.get("XDG_CONFIG_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "orion"


def load(environment: Mapping[str, str] = os.environ) -> Login:
    """Return the login of ORION_URL with ORION_TOKEN_FILE (and ORION_CA_FILE), else the one that `orion login` stored.

    Raise NotLoggedIn if only one of the pair is set, because a token must not be sent to the server of another login.
    """
    url, token_file = environment.get("ORION_URL"), environment.get("ORION_TOKEN_FILE")
    if url and token_file:
        return Login(clean_url(url), read_token(Path(token_file)), environment.get("ORION_CA_FILE") or None)
    if url or token_file:
        present, absent = ("ORION_URL", "ORION_TOKEN_FILE") if url else ("ORION_TOKEN_FILE", "ORION_URL")
        raise NotLoggedIn(f"{present} is set but {absent} is not: set both, or neither and {_HOW}")
    return _stored(folder(environment) / "config.json")


def store(login: Login, environment: Mapping[str, str] = os.environ) -> Path:
    """Store the login in a private file and return its path. Copy the certificate file beside it."""
    place = private_folder(environment)
    if login.ca_file:
        write_private(place / "ca.pem", Path(login.ca_file).read_text())
        login = login._replace(ca_file=str(place / "ca.pem"))
    write_private(place / "config.json", json.dumps(login._asdict(), indent=2) + "\n")
    return place / "config.json"


def private_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that `folder` names, made if it is missing, with mode 0700. Raise LocalFault."""
    place = folder(environment)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.chmod(0o700)
    except OSError as error:
        detail = f"cannot write to {place} ({error.strerror}): set XDG_CONFIG_HOME to another folder"
        raise LocalFault(detail) from error
    return place


def write_private(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Replace the file in one step. Users whom `mode` does not admit cannot read it at any time."""
    import tempfile  # noqa: PLC0415 - this module takes long to load

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "w" if isinstance(content, str) else "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_token(path: Path) -> str:
    """Return the token in this file. Raise NotLoggedIn if there is none."""
    try:
        return clean_token(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise NotLoggedIn(f"cannot read the token in {path}: {reason}") from error


def clean_token(text: str) -> str:
    """Return the token without blanks around it. Raise NotLoggedIn if an HTTP header could not carry it."""
    token = text.strip()
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise NotLoggedIn(
            "this is not a token. A token is one word such as orion_client_...; ask the platform's operator for one "
            "(to show the admin's token, run on the platform's machine: make -s token)"
        )
    return token


def clean_url(text: str) -> str:
    """Return `http(s)://host[:port][/prefix]`. Without a scheme, this machine gets http and any other https.

    Drop a trailing `/api`, because people copy the API's address from the pages. Raise InvalidInput.
    """
    if "://" not in text:
        text = ("http://" if is_this_machine(urlsplit(f"//{text}").hostname or "") else "https://") + text
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidInput(f"{text!r} is not an address: {error}") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise InvalidInput(f"{text!r} is not an address such as http://localhost:8080")
    if parts.username is not None or parts.query or parts.fragment or not text.isprintable() or " " in text:
        raise InvalidInput(f"{text!r} must be an address and nothing more, such as http://localhost:8080")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/api"), "", ""))


def is_this_machine(host: str) -> bool:
    """Return whether the host is localhost or a loopback address."""
    if not host[:1].isdigit() and ":" not in host:
        return host == "localhost" or host.endswith(".localhost")
    import ipaddress  # noqa: PLC0415 - this module takes long to load

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(url: str) -> str | None:
    """Return the forward proxy that the environment sets for this address, for HTTP calls and WebSockets alike.

    Return None for this machine, even if NO_PROXY does not name it. Raise InvalidInput for a proxy of another kind.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    # On systems other than Linux the desktop's settings count, too.
    may_have_proxies = sys.platform != "linux" or any(name.lower().endswith("_proxy") for name in os.environ)
    if is_this_machine(host) or not may_have_proxies:
        return None
    import urllib.request  # noqa: PLC0415 - this module takes long to load

    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and not proxy.startswith(("http://", "https://")):
        advice = f"unset its variable, or set NO_PROXY={host}"
        raise InvalidInput(f"orion cannot use the proxy {proxy} of the environment: {advice}")
    return proxy


def tls_context(login: Login) -> ssl.SSLContext:
    """Return a context that verifies the server. Raise InvalidInput if the certificate file cannot be used.

    The context for plain http trusts no authority, because the system's authorities take long to load.
    """
    import ssl  # noqa: PLC0415 - this module takes long to load

    if not login.url.startswith("https://"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return ssl.create_default_context(cafile=login.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"cannot use the certificate file {login.ca_file}: {error}") from error


def _stored(path: Path) -> Login:
    try:
        config = json.loads(path.read_text())
        return Login(clean_url(config["url"]), clean_token(config["token"]), config.get("ca_file"))
    except FileNotFoundError:
        raise NotLoggedIn(f"not logged in: {_HOW}") from None
    except OSError as error:
        raise NotLoggedIn(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotLoggedIn(f"{path} is damaged: {_HOW}") from error
