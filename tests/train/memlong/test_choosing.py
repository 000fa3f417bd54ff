"""What a block attends to in training is what it attends to in use: the same bank, the same search, the same losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvbank
from model_worker.attachment.model_parts import device_of
from model_worker.embed import embedder
from model_worker.model import MemoryModel
from model_worker.train.memlong.choosing import Search, Shares
from model_worker.train.memlong.course import Course
from model_worker.train.memlong.documents import Documents
from model_worker.train.memlong.learner import Learner
from model_worker.train.memlong.pool import Pool
from model_worker.train.memlong.remembering import Remembering
from model_worker.train.memlong.rows import Blocks
from model_worker.train.memlong.streams import Streams
from tests.train.memlong.runs import texts
from tests.worker.tiny import bank, build, tokenizer

CHUNK, BEFORE, TOKENS = 4, 2, 64
FOUND = Shares(0, 0, 0, 0)


def course(learner: Learner, paths: tuple[Path, ...], search: Search, shares: Shares, **more: Any) -> Course:
    """Make a course over the texts; one step of a stream reads all of a text."""
    attachment, own = learner.attachment, {"streams": 1, "memory": 16, "sinks": 0, "keep": False, **more}
    documents = Documents(paths, tokenizer(), 12)
    finds = embedder("lexical:idf")
    pool = Pool(own["streams"], own["memory"], finds.dimension)
    remembering = Remembering(documents, tokenizer(), finds, Blocks(CHUNK, BEFORE), search, 12, pool, own["keep"])
    streams = Streams(documents, own["streams"], TOKENS // CHUNK, CHUNK, 0, seed=0)
    alone = attachment.plan.mode == "memlong"
    return Course(streams, remembering, shares, learner, alone=alone, sinks=own["sinks"])


@pytest.mark.parametrize("mode", ["memlong", "per_layer"])
def test_losses_are_those_of_the_worker_over_a_service(tmp_path: Path, mode: str) -> None:
    paths = texts(tmp_path, 1, TOKENS)
    plan = {"mode": mode, "positions": "near:3"}
    order, sinks = ("time", 0) if mode == "memlong" else ("score", 2)
    settings: dict[str, Any] = {"top_k": 2, "recent": 1, "min_share": 0.3, "min_score": 0.2}
    how: dict[str, Any] = {"embed": "lexical:idf", "query_tokens": 12, "query": "past", "sinks": sinks}
    net, name = build("llama_gqa"), bank()
    with (
        kvbank.connect(tmp_path / "memory") as client,
        MemoryModel(
            *(net, tokenizer()),
            memory=client,
            bank=name,
            attach_options=plan,
            chunk=CHUNK,
            window=CHUNK * (BEFORE + 1),
            strict=True,
            **settings,
            **how,
        ) as model,
    ):
        expected = model.losses(paths[0].read_text(), memory=model.memory)
        learner = Learner(model.attachment, Blocks(CHUNK, BEFORE)).eval()
        own = course(learner, paths, Search(order=order, **settings), FOUND, sinks=sinks)
        with torch.no_grad():
            step = own.step()
            nats, _ = learner.nats(step)
    assert step.chosen is not None
    assert int((step.chosen.places >= 0).sum()) > 20
    torch.testing.assert_close(nats[0, :-1], expected.nll, rtol=0, atol=1e-4)


def test_shares_say_what_blocks_attend_to(tmp_path: Path) -> None:
    """Tell the kinds apart by their chunks: none, the last ones, another stream's, those that are like the block."""
    net = build("llama_gqa")
    from model_worker.attaching import attach

    attachment = attach(net, tokenizer(), mode="memlong")
    learner = Learner(attachment, Blocks(CHUNK, BEFORE))
    paths, search = texts(tmp_path, 3, TOKENS), Search(1, 2)

    def places(shares: Shares, keep: bool = False, how: Search = search) -> np.ndarray:
        own = course(learner, paths, how, shares, streams=2, keep=keep)
        own.keep(learner(own.step())[1])
        chosen = own.step().chosen
        assert chosen is not None
        return chosen.places.view(2, TOKENS // CHUNK, 3).numpy()

    assert (places(Shares(0, 1, 0, 0)) == -1).all()
    recent = places(Shares(1, 0, 0, 0))
    assert recent[1, 10].tolist() == [32 + 16 + chunk for chunk in (5, 6, 7)]
    assert recent[0, 2].tolist() == [-1, -1, -1]  # nothing has left the window
    other = places(Shares(0, 0, 1, 0), keep=True)
    for row, first in ((other[0], 16), (other[1], 0)):
        found = row[row >= 0]
        assert len(found) == 2 * 15, "each block but the first, which has no past, finds two chunks"
        assert ((found >= first) & (found < first + 16)).all()
    assert (places(Shares(0, 0, 1, 0), True, Search(1, 2, min_score=2.0)) == -1).all()
    itself = places(Shares(0, 0, 0, 1))
    assert itself[0, 12].tolist()[2] == 32 + 9
    # The second half of a text is the first again: block 8 + n is like chunk n.
    assert sum(32 + block - 8 in itself[0, block] for block in range(8, 16)) == 8
    attachment.detach()
    assert device_of(net).type == "cpu"


def test_a_memory_ends_with_its_document_unless_it_is_kept(tmp_path: Path) -> None:
    from model_worker.attaching import attach

    net = build("llama_gqa")
    attachment = attach(net, tokenizer(), mode="memlong")
    learner = Learner(attachment, Blocks(CHUNK, BEFORE))
    paths = texts(tmp_path, 1, TOKENS)
    for keep, first in ((False, -1), (True, 15)):
        own = course(learner, paths, Search(1, 1), Shares(1, 0, 0, 0), keep=keep)
        own.keep(learner(own.step())[1])
        step = own.step()
        assert step.chosen is not None
        assert int(step.chosen.places[0, 1]) == first
        assert not bool(step.chosen.own[0].any())
        assert bool(step.chosen.own[5].any())
    attachment.detach()
