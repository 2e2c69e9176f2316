"""Alembic's environment. The store passes its connection; there is no offline mode."""

from alembic import context

from orion.manager.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
