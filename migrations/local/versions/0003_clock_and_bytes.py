"""Revision 0003 keeps the time of the service, from which the next start goes on, and counts all that a chunk takes on
the disk among the bytes of its bank."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

# The same sum as in `memory_service.domain.chunk_size`: tensors, embedding, token ids, text, metadata, 256 for the
# record and 160 for the description of each tensor.
_SIZE = """
    UPDATE chunks SET size = payload_bytes + 256 + length(CAST(meta AS BLOB)) + coalesce((
        SELECT length(embedding) + length(token_ids) + length(CAST(text AS BLOB))
            + CASE WHEN json_valid(payload) THEN 160 * coalesce(json_array_length(payload, '$[0]'), 0) ELSE 0 END
        FROM contents WHERE contents.chunk_id = chunks.chunk_id), 0)
"""
_FOUND = "(SELECT coalesce(sum(size), 0) FROM chunks WHERE chunks.bank_id = banks.bank_id)"
# Bounds in bytes rise by what was not counted before, so that the new count alone evicts no chunk and refuses no write.
_CAPACITY = f"""
    UPDATE banks SET capacity = json_set(capacity, '$.limit', json_extract(capacity, '$.limit') + {_FOUND} - bytes)
    WHERE json_extract(capacity, '$.unit') = 'bytes'
"""
_QUOTA = f"""
    UPDATE banks SET quota = json_set(quota, '$.bytes', json_extract(quota, '$.bytes') + {_FOUND} - bytes)
    WHERE json_extract(quota, '$.bytes') > 0
"""


def upgrade() -> None:
    """Count the bytes of all chunks anew. The table of the time stays empty, so that the next start begins by the wall
    clock."""
    op.create_table(
        "clock",
        *[sa.Column(name, sa.Integer(), nullable=False) for name in ("id", "now", "running")],
        sa.Column("boot", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_clock"),
    )
    op.add_column("chunks", sa.Column("size", sa.Integer(), nullable=False, server_default=sa.text("0")))
    for statement in (_SIZE, _CAPACITY, _QUOTA, f"UPDATE banks SET bytes = {_FOUND}"):
        # Handed to the driver unchanged: SQLAlchemy would take a colon in it for a parameter.
        op.get_bind().exec_driver_sql(statement)
