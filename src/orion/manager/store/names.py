"""Makes ids that cannot be guessed, and names that people can pronounce."""

from __future__ import annotations

import secrets

_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_FIRST = "amber brave calm clever eager fair gentle happy keen kind lively lucky merry noble proud quick quiet swift"
_SECOND = "badger crane dolphin eagle falcon fox hare heron ibex lynx otter owl panda raven seal stork tern wren"


def new_id(length: int) -> str:
    """Return random characters of base 32, five bits each."""
    return "".join(secrets.choice(_BASE32) for _ in range(length))


def new_name() -> str:
    """Return a name for a rental whose renter gave none: adjective, animal, three characters against collisions."""
    return f"{secrets.choice(_FIRST.split())}-{secrets.choice(_SECOND.split())}-{new_id(3)}"
