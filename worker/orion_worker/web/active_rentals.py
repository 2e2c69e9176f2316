"""The rentals of this worker whose web ports may be reached now."""

from __future__ import annotations

from pathlib import Path

from orion_worker.freezer.marks import Freezer
from orion_worker.records import RentalRecord, RentalRecords
from orion_worker.system.files import text_of
from orion_worker.web.port_tokens import PortToken
from orion_worker.web.refusals import PortRefusal


class RunningRentals:
    """The rentals that may run here, from the files of the agent and of orion-rental. `root` differs in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._records = RentalRecords(root / "var/lib/orion/rentals")
        self._freezer = Freezer(root)
        self._session = root / "run/orion/session"

    def session_id(self) -> str:
        """Return the id of this worker's session, the secret that signs tokens; empty if there is none."""
        return text_of(self._session)

    def find(self, token: PortToken) -> RentalRecord:
        """Return the record of the token's rental; raise PortRefusal unless it may run here at the token's epoch."""
        record = self._records.find(token.rental_id)
        if record is None or record.epoch != token.epoch or record.ending or not record.activated:
            raise PortRefusal(503, "not_here", "the rental is not here, or not any more: try again in a moment")
        if self._freezer.is_frozen(token.rental_id) or not self._freezer.has_lease:
            raise PortRefusal(503, "frozen", "the rental is frozen at present: try again in a moment")
        return record
