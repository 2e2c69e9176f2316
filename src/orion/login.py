"""Where the platform is and who we are there: one small file, or the environment.

Standard library only, for the same reason as `orion.errors`; and what takes long to load only where it is needed.
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
    url: str
    token: str
    ca_file: str | None = None
    """The only certificate (or authority) to trust, in PEM; None: those that the system trusts."""

    def __repr__(self) -> str:
        return f"Login({self.url!r})"  # never the token: it must not reach a log


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    base = environment.get("XDG_CONFIG_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "orion"


def load(environment: Mapping[str, str] = os.environ) -> Login:
    """The login in force: ORION_URL with ORION_TOKEN_FILE (and ORION_CA_FILE), else what `orion login` stored.

    Half of the pair is refused: the stored token must not go to another server, nor another token to the stored one.
    """
    url, token_file = environment.get("ORION_URL"), environment.get("ORION_TOKEN_FILE")
    if url and token_file:
        return Login(clean_url(url), read_token(Path(token_file)), environment.get("ORION_CA_FILE") or None)
    if url or token_file:
        present, absent = ("ORION_URL", "ORION_TOKEN_FILE") if url else ("ORION_TOKEN_FILE", "ORION_URL")
        raise NotLoggedIn(f"{present} is set but {absent} is not: set both, or neither and {_HOW}")
    return _stored(folder(environment) / "config.json")


def store(login: Login, environment: Mapping[str, str] = os.environ) -> Path:
    """Keep the login for this user alone; a certificate file is copied, so that the original may go."""
    place = private_folder(environment)
    ca_file = None
    if login.ca_file:
        ca_file = place / "ca.pem"
        write_private(ca_file, Path(login.ca_file).read_text())
    config = {"url": login.url, "token": login.token, "ca_file": str(ca_file) if ca_file else None}
    write_private(place / "config.json", json.dumps(config, indent=2) + "\n")
    return place / "config.json"


def private_folder(environment: Mapping[str, str] = os.environ) -> Path:
    place = folder(environment)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.chmod(0o700)
    except OSError as error:
        detail = f"cannot keep anything in {place} ({error.strerror}): set XDG_CONFIG_HOME to another folder"
        raise LocalFault(detail) from error
    return place


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step; nobody else can read it at any moment."""
    import tempfile  # noqa: PLC0415 - see above

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_token(path: Path) -> str:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise NotLoggedIn(f"cannot read the token in {path}: {reason}") from error
    return clean_token(text)


def clean_token(text: str) -> str:
    """A token as a header may carry it; refused here rather than by a confusing error of the HTTP client."""
    token = text.strip()
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise NotLoggedIn(
            "that is not a token: it must be one word, such as orion_client_..., from whoever runs the platform "
            "(on its machine the admin's: make -s token)"
        )
    return token


def clean_url(text: str) -> str:
    """Return `http(s)://host[:port][/prefix]`. Where no scheme is given: http for this machine, else https.

    The address of the API, which people copy from the pages, is understood as that of the platform.
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
        raise InvalidInput(f"{text!r} must be only an address, such as http://localhost:8080")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/api"), "", ""))


def is_this_machine(host: str) -> bool:
    if not host[:1].isdigit() and ":" not in host:
        return host == "localhost" or host.endswith(".localhost")
    import ipaddress  # noqa: PLC0415 - see above

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(url: str) -> str | None:
    """The forward proxy that the environment asks for, one rule for HTTP calls and WebSockets.

    This machine is never reached through a proxy, whatever NO_PROXY forgot to say.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_this_machine(host) or not _may_have_proxies():
        return None
    import urllib.request  # noqa: PLC0415 - see above

    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and not proxy.startswith(("http://", "https://")):
        raise InvalidInput(
            f"the proxy {proxy} of the environment is of a kind that orion cannot use: unset it, or NO_PROXY={host}"
        )
    return proxy


def _may_have_proxies() -> bool:
    """On other systems than Linux the settings of the desktop count as well."""
    return sys.platform != "linux" or any(name.lower().endswith("_proxy") for name in os.environ)


def tls_context(login: Login) -> ssl.SSLContext:
    """Verification is always on. For plain http one that trusts nobody: the system's authorities take long to load."""
    import ssl  # noqa: PLC0415 - see above

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
