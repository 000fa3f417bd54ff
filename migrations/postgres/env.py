"""The entry of alembic: it runs the migrations on the connection that `memory_service.storage.revisions` hands over,
and in its transaction."""

from alembic import context

from memory_service.storage.postgres.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
