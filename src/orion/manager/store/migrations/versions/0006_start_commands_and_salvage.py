"""Start commands and salvage"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("rentals", schema=None) as batch_op:
        batch_op.add_column(sa.Column("let_in_epoch", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("began_with", sa.String(length=40), server_default="", nullable=False))
        batch_op.add_column(sa.Column("start", sa.Text(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("start_run", sa.Integer(), server_default="1", nullable=False))
        batch_op.add_column(sa.Column("start_problem", sa.Text(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("takeovers", sa.JSON(), server_default="[]", nullable=False))
    with op.batch_alter_table("placements", schema=None) as batch_op:
        batch_op.add_column(sa.Column("started", sa.String(length=100), server_default="", nullable=False))
        batch_op.add_column(sa.Column("salvaged", sa.Boolean(), server_default=sa.false(), nullable=False))
    with op.batch_alter_table("copies", schema=None) as batch_op:
        batch_op.add_column(sa.Column("salvage", sa.Boolean(), server_default=sa.false(), nullable=False))
    # Nobody has written down when a renter was let in; the latest epoch is never too early.
    op.execute("UPDATE rentals SET let_in_epoch = epoch WHERE activated_at IS NOT NULL")
