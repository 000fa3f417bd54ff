"""Runs the migrations on the connection that memory_service.schema hands over."""

from alembic import context

from memory_service.schema import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
