"""The process of the manager: `python -m orion.manager.main`. Its parts are put together in app.py."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO

import structlog
import uvicorn
from pydantic import ValidationError
from structlog.typing import Processor

from orion.manager.ansible.client import AnsibleEngine, ReachedAndExpected
from orion.manager.api.proxy_guard import protocol_for
from orion.manager.app import Ports, build
from orion.manager.controllers.proxy_probe import ProxyProbe
from orion.manager.controllers.snapshots import disk_share
from orion.manager.controllers.wall_clock import boot_id, boot_time_s
from orion.manager.gateway.port_connections import end_connections
from orion.manager.settings import Secrets, Settings
from orion.manager.snapshots.client import SnapshotClient
from orion.manager.ssh.liveness import SshLiveness
from orion.manager.ssh.reach import SshReach
from orion.manager.store.backup import Backups
from orion.manager.store.ballast import Ballast
from orion.manager.store.database import NewerSchema, Store

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
GRACEFUL_SHUTDOWN_S = 5
LOOK_AGAIN_S = 10.0
"""Seconds between two attempts to open a database of a newer version."""
LOOKS_PER_WORD = 30
"""Number of such attempts for each line of the log."""


def main() -> None:
    """Run the manager with the settings of the environment and the secrets from the entrypoint's pipe."""
    log_as_json()
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit("\n".join(f"ORION settings: {item['msg']}" for item in error.errors()))
    secrets = Secrets.from_pipe(int(os.environ["ORION_SECRETS_FD"]))
    lock = _lead(Path(settings.lock_file))
    store = _open_store_in_time(settings)
    # All interfaces: the proxy guard closes the connection of every other peer than the proxy.
    serve(settings, secrets, store, _real_ports(settings, secrets), "0.0.0.0")  # noqa: S104
    lock.close()


def _real_ports(settings: Settings, secrets: Secrets) -> Ports:
    reach = SshReach(secrets.ssh_private_key)
    engine = AnsibleEngine(Path(settings.engine_socket))
    return Ports(
        engine=engine,
        reach=ReachedAndExpected(reach, engine),
        snapshot_service=SnapshotClient(Path(settings.vault_socket)),
        proxy_probe=ProxyProbe(
            settings.door_url, settings.clocks.door_answer_s, min(1.0, settings.clocks.heartbeat_s / 30)
        ),
        snapshots_disk=partial(disk_share, Path(settings.copies_directory)),
        liveness=SshLiveness(reach),
        end_connections=end_connections,
        boot_time=boot_time_s,
        boot_id=boot_id(),
    )


def _lead(path: Path) -> IO[str]:
    """Return the lock of the only manager, which ends with the process; end the process if another manager has it.

    There is one manager at a time because leases are in its memory.
    """
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another manager is active on {path.parent}: stop it first")
    return lock


def _open_store_in_time(settings: Settings) -> Store:
    """Open the database; wait while it is of a newer version, because Docker restarts a process that ends.

    Nothing listens meanwhile, so the proxy answers that the manager is away, and no worker freezes its rentals.
    """
    attempts = count()
    while True:
        try:
            return open_store(settings, Store)
        except NewerSchema as newer:
            if next(attempts) % LOOKS_PER_WORD == 0:
                log.error("the manager does not start: it waits for a database that it understands", why=str(newer))
        time.sleep(LOOK_AGAIN_S)


def open_store(settings: Settings, make: Callable[[str, Ballast | None], Store]) -> Store:
    """Return the store that `make` makes, with its schema up to date, after swapping in an accepted backup."""
    backups = Backups.of(settings.database_url)
    if backups and backups.swap_in():
        log.warning("restored from a backup", former_database=backups.replaced.name)
    store = make(settings.database_url, Ballast.of(settings.database_url, settings.ballast_bytes))
    try:
        store.migrate()
    except BaseException:
        store.close()
        raise
    return store


def serve(settings: Settings, secrets: Secrets, store: Store, ports: Ports, host: str) -> None:
    """Run the manager until a signal ends it."""
    uvicorn.run(
        build(settings, secrets, store, ports),
        host=host,
        port=settings.port,
        http=protocol_for(frozenset({str(settings.proxy_address), LOOPBACK})),
        ws="websockets-sansio",
        ws_max_size=2**20,
        # A client whose ssh is suspended answers no ping, and is still there: TCP finds dead ones (gateway/relay.py).
        ws_ping_timeout=None,
        ws_per_message_deflate=False,  # encrypted data does not shrink
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
    )
    store.close()


def log_as_json() -> None:
    """Write each line of the log as one JSON object to the standard output."""
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    structlog.configure(processors=processors, logger_factory=structlog.PrintLoggerFactory(sys.stdout))
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stdout, format='{"event": "%(message)s", "level": "%(levelname)s"}'
    )


if __name__ == "__main__":
    main()
