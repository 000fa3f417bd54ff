"""The time of the service, from which a start goes on; all that a chunk takes on the disk, in the bytes of its bank."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

# As memory_service.domain.chunk_size counts: tensors, embedding, token ids, text, metadata, 256 for the record and 160
# for the description of each tensor.
_SIZE = """
    UPDATE chunks SET size = payload_bytes + 256 + length(CAST(meta AS BLOB)) + coalesce((
        SELECT length(embedding) + length(token_ids) + length(CAST(text AS BLOB))
            + CASE WHEN json_valid(payload) THEN 160 * coalesce(json_array_length(payload, '$[0]'), 0) ELSE 0 END
        FROM contents WHERE contents.chunk_id = chunks.chunk_id), 0)
"""
_FOUND = "(SELECT coalesce(sum(size), 0) FROM chunks WHERE chunks.bank_id = banks.bank_id)"
# Bounds in bytes rise by what was not counted before, so that no chunk goes, and no write is refused, for that alone.
_CAPACITY = f"""
    UPDATE banks SET capacity = json_set(capacity, '$.limit', json_extract(capacity, '$.limit') + {_FOUND} - bytes)
    WHERE json_extract(capacity, '$.unit') = 'bytes'
"""
_QUOTA = f"""
    UPDATE banks SET quota = json_set(quota, '$.bytes', json_extract(quota, '$.bytes') + {_FOUND} - bytes)
    WHERE json_extract(quota, '$.bytes') > 0
"""


def upgrade() -> None:
    """Count what there is. No mark of the time yet: the next start begins by the wall clock."""
    op.create_table(
        "clock",
        *[sa.Column(name, sa.Integer(), nullable=False) for name in ("id", "now", "running")],
        sa.Column("boot", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_clock"),
    )
    op.add_column("chunks", sa.Column("size", sa.Integer(), nullable=False, server_default=sa.text("0")))
    for statement in (_SIZE, _CAPACITY, _QUOTA, f"UPDATE banks SET bytes = {_FOUND}"):
        # As it is: a colon in it is none of a parameter's.
        op.get_bind().exec_driver_sql(statement)
