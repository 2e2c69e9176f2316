"""Indexes for a large pool"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_LIVING = sa.text("state NOT IN ('released', 'expired', 'failed')")


def upgrade() -> None:
    op.create_index("ix_placements_worker_id_state", "placements", ["worker_id", "state"])
    op.create_index("ix_rentals_living", "rentals", ["id"], sqlite_where=_LIVING, postgresql_where=_LIVING)
    op.create_index("ix_rentals_owner_id", "rentals", ["owner", "id"])
    op.create_index("ix_rentals_name", "rentals", ["name"])
    op.create_index("ix_rentals_due", "rentals", ["expires_at"], sqlite_where=_LIVING, postgresql_where=_LIVING)
