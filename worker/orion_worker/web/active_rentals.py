"""Active"""

from __future__ import annotations

from pathlib import Path

from orion_worker.freezer.marks import Freezer
from orion_worker.records import RentalRecord, RentalRecords
from orion_worker.web.port_tokens import PortToken
from orion_worker.web.refusals import PortRefusal


class RunningRentals:
    """Who is here and may run, by what the agent and orion-rental keep. `root` is another directory in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._records = RentalRecords(root / "var/lib/orion/rentals")
        self._freezer = Freezer(root)
        self._session = root / "run/orion/session"

    def session_id(self) -> str:
        try:
            return self._session.read_text()
        except FileNotFoundError:
            return ""

    def find(self, token: PortToken) -> RentalRecord:
        """Raises PortRefusal unless it may run here at that epoch."""
        record = self._records.find(token.rental_id)
        if record is None or record.epoch != token.epoch or record.ending or not record.activated:
            raise PortRefusal(503, "not_here", "the rental is not here, or not any more: try again in a moment")
        if self._freezer.is_frozen(token.rental_id) or not self._freezer.has_lease:
            raise PortRefusal(503, "frozen", "the rental stands still at present: try again in a moment")
        return record
