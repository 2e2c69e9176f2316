"""The process of the manager, from its settings to its last signal: `python -m orion.manager.main`.

What the manager consists of is in app.py.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
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
"""The seconds between two looks at a database of a newer version."""
LOOKS_PER_WORD = 30
"""The number of such looks for one line in the log."""


def main() -> None:
    """Run the manager with the settings of the environment and the secrets of the entrypoint's pipe."""
    log_as_json()
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit("\n".join(f"ORION settings: {item['msg']}" for item in error.errors()))
    secrets = Secrets.from_pipe(int(os.environ["ORION_SECRETS_FD"]))
    lock = _lead(Path(settings.lock_file))
    store = _open_store_in_time(settings)
    ports = _real_ports(settings, secrets)
    serve(settings, secrets, store, ports, "0.0.0.0")  # noqa: S104  the door hangs up on every peer but the proxy
    lock.close()


def _real_ports(settings: Settings, secrets: Secrets) -> Ports:
    reach = SshReach(secrets.ssh_private_key)
    engine = AnsibleEngine(Path(settings.engine_socket))
    return Ports(
        engine,
        ReachedAndExpected(reach, engine),
        SnapshotClient(Path(settings.vault_socket)),
        ProxyProbe(settings.door_url, settings.clocks.door_answer_s, min(1.0, settings.clocks.heartbeat_s / 30)),
        partial(disk_share, Path(settings.copies_directory)),
        watch=SshLiveness(reach),
        end_connections=end_connections,
        boot_time=boot_time_s,
        boot_id=boot_id(),
    )


def _lead(path: Path) -> IO[str]:
    """Return the lock of the one active manager, which ends with the process; end the process if another has it.

    There is one manager at a time because leases live in its memory.
    """
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another manager is active on {path.parent}: stop it first")
    return lock


def _open_store_in_time(settings: Settings) -> Store:
    """Open the database, and wait while it is of a newer version: a process that ends is only started again.

    Nothing listens meanwhile, so the proxy says that the manager is not there, and no worker freezes what runs on it.
    """
    looks = 0
    while True:
        try:
            return open_store(settings, Store)
        except NewerSchema as newer:
            if looks % LOOKS_PER_WORD == 0:
                log.error("the manager does not start: it waits for a database that it understands", why=str(newer))
        looks += 1
        time.sleep(LOOK_AGAIN_S)


def open_store(settings: Settings, make: Callable[[str, Ballast | None], Store]) -> Store:
    """Return the store by `make`: of the database of a restore that was accepted, its schema up to date."""
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
    """Run the manager until it is told to end."""
    uvicorn.run(
        build(settings, secrets, store, ports),
        host=host,
        port=settings.port,
        http=protocol_for(frozenset({str(settings.proxy_address), LOOPBACK})),
        ws="websockets-sansio",
        ws_max_size=2**20,
        # A renter who suspends ssh answers no ping and is not gone: TCP ends what is dead (gateway/relay.py).
        ws_ping_timeout=None,
        ws_per_message_deflate=False,  # what ssh encrypted does not shrink
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
    )
    store.close()


def log_as_json() -> None:
    """Have each line of the log be one JSON object on the standard output."""
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
