"""What the files of a rental grew out of, and homes that are nearly too large"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("rentals", schema=None) as batch_op:
        batch_op.add_column(sa.Column("lineage", sa.JSON(), server_default="[]", nullable=False))
        batch_op.add_column(sa.Column("home_warning", sa.Text(), server_default="", nullable=False))
