"""A bank is opened for a model: made where there is none, and refused where its chunks are not this model's.

This file owns the rule that K-V are only ever read by the model that made them, and embeddings only compared with those
of one embedder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.attachment.attachment import Attachment
from model_worker.dtypes import NAMES
from model_worker.embed import Embedder, name_of, of_bank
from model_worker.errors import BankMismatch
from model_worker.remember.service_link import START_S, ServiceLink


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a memory wants of a bank.

    kv: the form of its K-V. dtype: of the stored K-V, where the user asked for one. capacity, policy, metadata: of a
    bank that is made.
    """

    kv: kvbank.KVSpec
    dtype: str | None = None
    capacity: kvbank.Capacity | None = None
    policy: kvbank.Policy | None = None
    metadata: Mapping[str, Scalar] | None = None


def kv_spec(attachment: Attachment, dtype: str | None) -> kvbank.KVSpec:
    """Describe the K-V that the attached model writes. dtype: of what is stored; None: the model's own."""
    own = next(attachment.model.parameters()).dtype
    table: Any = attachment.model.get_input_embeddings()  # type: ignore[operator]
    return kvbank.KVSpec(
        reader_digest=attachment.reader.digest,
        layers=attachment.plan.memory_layers,
        kv_heads=attachment.kv_heads,
        head_dim=attachment.head_dim,
        dtype=dtype or NAMES[own],
        reader_parts=attachment.reader.parts,
        hidden_size=table.weight.shape[1],
    )


def open_bank(link: ServiceLink, name: str, wanted: Wanted, embedder: Embedder) -> tuple[kvbank.Bank, Embedder]:
    """Return the bank `name`, which is made if it is not there, and the form of `embedder` by which it is searched.

    Raises BankMismatch, which names both digests, for a bank of another model or embedder.
    """
    made = kvbank.BankSettings(capacity=wanted.capacity, policy=wanted.policy, metadata=wanted.metadata or {})
    bank, embedder = _found_or_made(link, name, embedder, wanted.kv, **made)
    _check_fits(bank, wanted, embedder)
    return bank, embedder


def open_passages(
    link: ServiceLink, name: str, embedder: Embedder, **made: Unpack[kvbank.BankSettings]
) -> tuple[kvbank.Bank, Embedder]:
    """Return the bank `name` for its texts and token ids alone, and the form of `embedder` by which it is searched.

    It may be a bank with K-V of any model. made: settings of a bank that is made, without K-V, if it is not there.
    Raises BankMismatch for a bank of another embedder.
    """
    bank, embedder = _found_or_made(link, name, embedder, None, **made)
    check_embedder(bank, embedder)
    return bank, embedder


def readable_bank(client: kvbank.Client, name: str, attachment: Attachment, embedder: Embedder) -> Embedder:
    """Check that a model can read the bank `name`, which is there, besides a bank of its own.

    Returns the form of `embedder` by which the bank is searched. Raises BankMismatch for K-V of another model, and for
    a bank of another embedder, whose scores could not be compared; kvbank.BankNotFound.
    """
    bank = client.get_bank(name, timeout=START_S)
    embedder = of_bank(embedder, bank.embedding.embedder_digest)
    _check_fits(bank, Wanted(kv_spec(attachment, None)), embedder)
    return embedder


def _found_or_made(
    link: ServiceLink,
    name: str,
    embedder: Embedder,
    kv: kvbank.KVSpec | None,
    **made: Unpack[kvbank.BankSettings],
) -> tuple[kvbank.Bank, Embedder]:
    """Return the bank `name` and the form of `embedder` that is the bank's; make the bank if it is not there."""
    try:
        bank = link.client.get_bank(name, timeout=START_S)
        return bank, of_bank(embedder, bank.embedding.embedder_digest)
    except kvbank.BankNotFound:
        spec = kvbank.EmbeddingSpec(embedder.digest, embedder.dimension)
        patience = max(START_S, link.patience)
        return link.client.create_bank(name, kv=kv, embedding=spec, exist_ok=True, timeout=patience, **made), embedder


def _check_fits(bank: kvbank.Bank, wanted: Wanted, embedder: Embedder) -> None:
    """Refuse a bank of another model or embedder digest. Raises BankMismatch."""
    have, kv = bank.kv, wanted.kv
    if have is None:
        what = f"kvbank reencode {bank.name} --model MODEL gives it K-V"
        raise BankMismatch(f"bank {bank.name!r} holds vectors only: take another bank, or {what}")
    if have.reader_digest != kv.reader_digest:
        parts = [part for part, value in kv.reader_parts.items() if have.reader_parts.get(part) != value]
        raise BankMismatch(
            f"bank {bank.name!r} was written by another model (digest {have.reader_digest}, this one is "
            f"{kv.reader_digest}; {', '.join(parts)} differ)"
        )
    if tuple(have.layers) != tuple(kv.layers):
        raise BankMismatch(f"bank {bank.name!r} holds layers {have.layers}, this worker remembers {kv.layers}")
    if have.hidden_size not in (0, kv.hidden_size):
        raise BankMismatch(
            f"bank {bank.name!r} holds soft tokens of {have.hidden_size} numbers, this model reads {kv.hidden_size}"
        )
    if wanted.dtype is not None and have.dtype != wanted.dtype:
        raise BankMismatch(f"bank {bank.name!r} stores {have.dtype}, not {wanted.dtype}")
    check_embedder(bank, embedder)


def check_embedder(bank: kvbank.Bank, embedder: Embedder) -> None:
    """Refuse a bank that is searched by another embedder. Raises BankMismatch, which names both digests."""
    if bank.embedding.embedder_digest != embedder.digest:
        raise BankMismatch(
            f"bank {bank.name!r} is searched by another embedder (digest {bank.embedding.embedder_digest}, this one, "
            f"{name_of(embedder)}, has {embedder.digest})"
        )
