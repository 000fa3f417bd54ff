"""How many bytes chunks take in messages, told from the lengths of their columns."""

from collections.abc import Iterable, Mapping

# The bytes in a message of what is not looked at: ids, times, the name of the bank and the like.
_MOST_REST = 1024


def bounds(rows: Iterable[tuple[int, int, int, int]], times: Mapping[int, int]) -> tuple[int, int]:
    """Return the least and the most bytes that chunks take in messages, each id so many times.

    rows: of each chunk its id, the bytes of its text, those of its token ids, and twice those of its metadata as JSON
    with those of its descriptor: a short number takes more bytes in a message than digits in JSON.
    """
    least = most = 0
    for chunk_id, text, token_ids, rest in rows:
        least += times[chunk_id] * (text + token_ids // 4)
        most += times[chunk_id] * (text + 2 * token_ids + rest + _MOST_REST)
    return least, most
