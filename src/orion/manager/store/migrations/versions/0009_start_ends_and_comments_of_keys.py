"""How start commands ended, and what keys are called"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("placements", schema=None) as batch_op:
        batch_op.add_column(sa.Column("start_end", sa.String(length=20), server_default="", nullable=False))
        batch_op.add_column(sa.Column("start_ended_at", sa.Float(), nullable=True))
    with op.batch_alter_table("rentals", schema=None) as batch_op:
        batch_op.add_column(sa.Column("key_comments", sa.JSON(), server_default="{}", nullable=False))
