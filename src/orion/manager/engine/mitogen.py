"""Mitogen's strategy, for those who ask for it: how it is loaded, and the guard between it and a worker's root.

Mitogen believes the interpreters that it starts on workers more than we may. Seen with 0.3.54 (docs/decisions.md):
a worker may announce a route to context 0, which is the engine itself, and then speak with the engine's authority, up
to starting programs there; and it may ask for any file as the resource of a package. So everything that comes from a
worker passes `Guard` before Mitogen acts on it.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mitogen.core import ADD_ROUTE, ALLOCATE_ID, DEL_ROUTE, FORWARD_LOG, GET_MODULE

MAX_MESSAGE_BYTES = 1 << 22
THREADS = "8"
FIRST_REPLY_HANDLE = 1000
"""Below are Mitogen's services; from here on are places for one reply each, which take it from who was asked alone."""
ENGINE = 0
"""The id of the context that is the engine."""
SERVICES = frozenset((GET_MODULE, FORWARD_LOG, ADD_ROUTE, DEL_ROUTE, ALLOCATE_ID))
"""What a worker may ask of the engine: source of Ansible's modules, a line in the log, numbers for its own processes.
Not: services, files, resources."""

log = logging.getLogger("orion.engine")


def load(directory: Path) -> None:
    """Before Ansible is loaded: its strategy is Mitogen's, and what comes from workers is guarded.

    Raises ImportError where Mitogen does not load with this Ansible.
    """
    found = find_spec("ansible_mitogen")
    if found is None or found.origin is None:
        raise ImportError("ansible_mitogen is not installed")
    settings = {
        "ANSIBLE_STRATEGY": "mitogen_linear",
        "ANSIBLE_STRATEGY_PLUGINS": str(Path(found.origin).parent / "plugins" / "strategy"),
        "MITOGEN_POOL_SIZE": THREADS,
        "MITOGEN_CPU_COUNT": "1",
        "TMPDIR": str(directory),
    }
    os.environ.update(settings)
    import ansible_mitogen.affinity  # noqa: PLC0415 - it reads the environment that is set here
    import ansible_mitogen.loaders  # noqa: PLC0415 - as above
    import ansible_mitogen.process  # noqa: PLC0415 - as above
    from ansible.errors import AnsibleError  # noqa: PLC0415 - as above

    try:
        ansible_mitogen.loaders.assert_supported_release()
    except AnsibleError as error:
        raise ImportError(str(error)) from error

    ansible_mitogen.affinity.policy = ansible_mitogen.affinity.Policy()  # pins no process to a processor
    ansible_mitogen.process.MAX_MESSAGE_SIZE = MAX_MESSAGE_BYTES
    set_up = ansible_mitogen.process.MuxProcess._setup_master

    def set_up_guarded(multiplexer: Any) -> None:
        set_up(multiplexer)
        Guard(multiplexer.router)

    ansible_mitogen.process.MuxProcess._setup_master = set_up_guarded


class Guard:
    """Stands between the streams from workers and a router of Mitogen. What is refused is dropped and logged."""

    def __init__(self, router: Any) -> None:
        self._router = router
        self._route = router._async_route
        self._granted: dict[Any, list[range]] = {}
        """By stream: the ids that it was given for processes of its own."""
        router._async_route = self.route
        router.add_handler(self._allocate, ALLOCATE_ID, overwrite=True)

    def route(self, message: Any, stream: Any = None) -> None:
        """Streams with an authority of their own are the engine's processes (mitogen.unix); None is the engine."""
        if stream is not None and stream.protocol.auth_id is None:
            refusal = self._refusal(message, stream)
            if refusal:
                log.error("a message of %s was dropped: %s", stream.protocol.remote_id, refusal)
                return
        self._route(message, stream)

    def _refusal(self, message: Any, stream: Any) -> str:
        if not (self._is_its_own(message.src_id, stream) and self._is_its_own(message.auth_id, stream)):
            return "it claims to come from somebody else"
        if message.handle >= FIRST_REPLY_HANDLE:
            return ""
        if message.dst_id != ENGINE or message.handle not in SERVICES:
            return f"it asks {message.dst_id} for service {message.handle}"
        if message.handle in (ADD_ROUTE, DEL_ROUTE) and not self._is_a_route_of(message, stream):
            return "it is about a route that is not its own"
        return ""

    def _is_a_route_of(self, message: Any, stream: Any) -> bool:
        target = bytes(message.data).partition(b":")[0]
        return target.isdigit() and self._is_its_own(int(target), stream)

    def _is_its_own(self, identity: int, stream: Any) -> bool:
        granted = self._granted.get(stream, ())
        return identity == stream.protocol.remote_id or any(identity in each for each in granted)

    def _allocate(self, message: Any) -> None:
        if message.is_dead:
            return
        first, end = self._router.id_allocator.allocate_block()
        stream = self._router.stream_by_id(message.src_id)
        self._granted.setdefault(stream, []).append(range(first, end))
        message.reply((first, end))
