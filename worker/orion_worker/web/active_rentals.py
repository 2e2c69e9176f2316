"""Active"""

from __future__ import annotations

from pathlib import Path

from orion_worker.freezer.marks import Freezer
from orion_worker.records import Ledger, Record
from orion_worker.web.port_tokens import Way
from orion_worker.web.refusals import Refusal


class Tenants:
    """Who is here and may run, by what the agent and orion-rental keep. `root` is another directory in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._ledger = Ledger(root / "var/lib/orion/rentals")
        self._freezer = Freezer(root)
        self._session = root / "run/orion/session"

    def session_id(self) -> str:
        try:
            return self._session.read_text()
        except FileNotFoundError:
            return ""

    def find(self, way: Way) -> Record:
        """Raises Refusal unless it may run here at that epoch."""
        record = self._ledger.living(way.rental_id)
        if record is None or record.epoch != way.epoch or record.ending or not record.let_in:
            raise Refusal(503, "not_here", "the rental is not here, or not any more: try again in a moment")
        if self._freezer.is_frozen(way.rental_id) or not self._freezer.has_lease:
            raise Refusal(503, "frozen", "the rental stands still at present: try again in a moment")
        return record
