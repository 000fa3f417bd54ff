"""Hits below a share of the best score are left out, whether or not the server knows the option."""

import asyncio
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

import kvbank
from tests.sdk.host import Host
from tests.sdk.relay import Relay

EMBEDDER = "cd" * 32
QUERIES = np.array([[2, 0], [-1, 0]], np.float32)
# The scores of the hits that each share leaves.
LEFT = {
    None: [[2, 1, 0.2], [-0.1, -0.5, -1]],
    0.0: [[2, 1, 0.2], [-0.1]],
    0.3: [[2, 1], [-0.1]],
    0.5: [[2, 1], [-0.1]],
    1.0: [[2], [-0.1]],
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give a server whose bank has three chunks, with scores of 2, 1 and 0.2 for the first query."""
    digests = {"reader_digest": "", "embedder_digest": EMBEDDER}
    embedding = kvbank.EmbeddingSpec(EMBEDDER, 2)
    with closing(Host(tmp_path_factory.mktemp("host") / "data", None, embedding, digests)) as host:
        host.write(*(kvbank.NewChunk([x, 0]) for x in (1, 0.5, 0.1)))
        yield host


def scores(found: kvbank.Retrieval) -> list[list[float]]:
    assert set(found.chunks) == {hit.chunk_id for hits in found.queries for hit in hits}
    return [[round(hit.score, 3) for hit in hits] for hits in found.queries]


def test_a_server_that_does_not_know_the_share(host: Host) -> None:
    """Test with a server that answers as if nothing had been said of a share, as one of an earlier version does."""
    with closing(Relay(host.address)) as relay, kvbank.connect(relay.address) as client:
        every: list[bytes] = []
        relay.change("Retrieve", every.__iadd__)
        client.retrieve("b", QUERIES, embedder_digest=EMBEDDER)
        relay.change("Retrieve", lambda frames: every)
        for share, wanted in LEFT.items():
            assert scores(client.retrieve("b", QUERIES, embedder_digest=EMBEDDER, min_share=share)) == wanted

        async def asked() -> kvbank.Retrieval:
            async with kvbank.connect_async(relay.address) as client:
                return await client.retrieve("b", QUERIES, embedder_digest=EMBEDDER, min_share=0.5)

        assert scores(asyncio.run(asked())) == LEFT[0.5]


def test_a_server_that_knows_the_share(host: Host) -> None:
    for share, wanted in LEFT.items():
        assert scores(host.client.retrieve("b", QUERIES, embedder_digest=EMBEDDER, min_share=share)) == wanted
