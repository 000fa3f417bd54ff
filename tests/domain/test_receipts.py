"""A receipt of forgetting, as it is kept from step to step."""

from memory_service.domain.forgetting import MOST_NAMED, ForgottenChunk, Receipt
from memory_service.storage.forgetting.receipt_row import counts_of, receipt_of


def kept(receipt: Receipt) -> Receipt:
    """Return a receipt as the next step reads it."""
    return receipt_of(receipt.receipt_id, receipt.time, receipt.key_id, receipt.target, counts_of(receipt))


def test_the_chunks_that_a_receipt_names_are_copied_no_more_when_it_names_no_further_ones() -> None:
    """Count thousands of chunks in steps; a step beyond those that are named touches none of these."""
    receipt = Receipt("r", 1, "k", 'chunks of bank ", "chunks": [] by a filter')
    for step in range(3):
        some = [ForgottenChunk(', "chunks": ', step * MOST_NAMED + number, 7) for number in range(MOST_NAMED - 1)]
        receipt = kept(receipt.plus(chunks=some, rows=len(some), turns=1))
    assert [chunk.chunk_id for chunk in receipt.chunks] == [*range(MOST_NAMED - 1), MOST_NAMED]
    assert (receipt.places["rows"], receipt.turns) == (3 * (MOST_NAMED - 1), 3)
    full = kept(receipt)
    assert full == receipt
    assert kept(full.plus(chunks=some, rows=1)).chunks is full.chunks
