"""Copies of homes"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "copies",
        sa.Column("rental_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("files", sa.BigInteger(), nullable=False),
        sa.Column("skipped", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["rental_id"], ["rentals.id"], name=op.f("fk_copies_rental_id")),
        sa.PrimaryKeyConstraint("rental_id", "epoch", "number", name=op.f("pk_copies")),
    )
    with op.batch_alter_table("rentals", schema=None) as batch_op:
        batch_op.add_column(sa.Column("last_safe_copy_bytes", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("copy_problem", sa.Text(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("restore_from", sa.String(length=40), nullable=True))
