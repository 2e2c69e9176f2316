"""Planned moves"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_BEFORE = sa.text("state IN ('reserved', 'preparing', 'running')")
_LIVE = sa.text("state IN ('reserved', 'preparing', 'running') AND NOT standby")
_STANDBY = sa.text("state IN ('reserved', 'preparing', 'running') AND standby")


def upgrade() -> None:
    # One by one: a batch would write the tables of SQLite anew, with their constraints in any order.
    op.add_column("rentals", sa.Column("last_epoch", sa.Integer(), server_default="0", nullable=False))
    op.add_column("placements", sa.Column("standby", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("placements", sa.Column("held", sa.Integer(), server_default="0", nullable=False))
    op.add_column("placements", sa.Column("filled", sa.String(length=40), server_default="", nullable=False))
    op.drop_index("uq_placements_live", "placements")
    for name, which in (("uq_placements_live", _LIVE), ("uq_placements_standby", _STANDBY)):
        op.create_index(name, "placements", ["rental_id"], unique=True, sqlite_where=which, postgresql_where=which)
