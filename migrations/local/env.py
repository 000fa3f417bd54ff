"""The entry of alembic: it runs the migrations on the connection that `memory_service.storage.revisions` hands over."""

from alembic import context

from memory_service.storage.local.records.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
