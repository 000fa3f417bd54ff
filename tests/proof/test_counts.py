"""Retrievals are counted behind the answer: a kill costs at most those of the last second, a clean stop none.

`fetch` tells what is written so far, and writes nothing itself, unlike the calls that list chunks.
"""

from functools import partial

import kvbank
from tests.proof.content import DIGESTS, EMBEDDING, KV, READER, chunk_of, new_key, vector_of
from tests.support.service_process import Service
from tests.support.waiting import wait_until

BANK, CHUNKS = "b", 5


def _fill(service: Service) -> list[int]:
    with kvbank.connect(service.address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
        keys = [new_key(tokens=2) for _ in range(CHUNKS)]
        return [result.chunk_id for result in client.write_many(BANK, map(chunk_of, keys), **DIGESTS)]


def _retrieve(client: kvbank.Client, times: int) -> None:
    """Retrieve all chunks, each time."""
    for _ in range(times):
        assert len(client.retrieve(BANK, vector_of(bytes(16)), top_k=CHUNKS, **DIGESTS).chunks) == CHUNKS


def _written(client: kvbank.Client, ids: list[int]) -> set[int]:
    """Return the count of the chunks: one figure, as each retrieval has all of them."""
    return {chunk.retrieval_count for chunk in client.fetch(BANK, ids, reader_digest=READER)}


def _are(count: int, client: kvbank.Client, ids: list[int]) -> bool:
    return _written(client, ids) == {count}


def _listed(client: kvbank.Client) -> set[int]:
    """Return the count by a call that has all counts written first."""
    return {chunk.retrieval_count for chunk in client.list_chunks(BANK)}


def test_a_kill_costs_no_more_than_what_no_reader_has_seen_yet(host, tmp_path):
    """Retrievals that were written without being asked for stay, of 40 to 50, and none is made up."""
    service = host.start(tmp_path / "data")
    ids, least = _fill(service), 0
    for kill in range(3):
        with kvbank.connect(service.address) as client:
            begun = least + 40
            _retrieve(client, 40)
            wait_until(partial(_are, begun, client, ids), f"retrieval {begun} is never written")
            if kill % 2:
                assert _listed(client) == {begun}  # once written, they are not written again
            _retrieve(client, 5 * kill)
            service.kill()
        service = host.start(tmp_path / "data")
        with kvbank.connect(service.address) as client:
            (least,) = _written(client, ids)  # all of one retrieval are written in one transaction
            assert begun <= least <= begun + 5 * kill
            assert _listed(client) == {least}
    service.stop()


def test_a_clean_stop_costs_no_count(host, tmp_path):
    service = host.start(tmp_path / "data")
    ids, counted = _fill(service), 0
    for times in (1, 7, 30):
        with kvbank.connect(service.address) as client:
            _retrieve(client, times)
        counted += times
        assert service.stop() == 0
        service = host.start(tmp_path / "data")
        with kvbank.connect(service.address) as client:
            assert _written(client, ids) == {counted}
    service.stop()
