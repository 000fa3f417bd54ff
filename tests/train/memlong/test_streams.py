"""Streams come to documents and begin them as a text may begin in use."""

from pathlib import Path

import numpy as np
import torch

from model_worker.embed import embedder
from model_worker.train.memlong.choosing import Search
from model_worker.train.memlong.documents import Documents
from model_worker.train.memlong.pool import Pool
from model_worker.train.memlong.remembering import Remembering
from model_worker.train.memlong.rows import Blocks
from model_worker.train.memlong.streams import Streams
from tests.train.memlong.runs import texts
from tests.worker.tiny import tokenizer

BEGIN, CHUNK, BLOCKS = 1, 4, 4


def test_a_stream_that_comes_to_a_document_begins_with_the_token_of_a_text_or_without(tmp_path: Path) -> None:
    documents = Documents(texts(tmp_path, 2, 64), tokenizer(), 12)
    streams = Streams(documents, 2, BLOCKS, CHUNK, visit=2, seed=0, begin=BEGIN)
    begun, entered = 0, 0
    for _ in range(200):
        for piece in streams.pieces():
            first = piece.begin * CHUNK
            own = documents.ids(piece.document)[first : first + piece.count * CHUNK]
            assert (piece.ids[1 : len(own)] == own[1:]).all()
            entered += piece.entered
            if piece.ids[0] != own[0]:
                assert (piece.entered, piece.ids[0]) == (True, BEGIN)
                begun += 1
    assert 0.35 < begun / entered < 0.65
    assert BEGIN not in np.concatenate([documents.ids(0), documents.ids(1)]), "the documents themselves are not changed"


def test_the_token_that_a_document_was_begun_with_stays_among_the_sinks(tmp_path: Path) -> None:
    documents = Documents(texts(tmp_path, 2, 64), tokenizer(), 12)
    streams = Streams(documents, 2, BLOCKS, CHUNK, visit=0, seed=0, begin=BEGIN)
    finds = embedder("lexical:d=8")
    parts = Blocks(CHUNK, 1), Search(2, 0), CHUNK, Pool(2, 4, finds.dimension)
    remembering = Remembering(documents, tokenizer(), finds, *parts)
    read: dict[int, int] = {}
    begun = 0
    for _ in range(100):
        pieces = streams.pieces()
        read |= {stream: int(piece.ids[0]) for stream, piece in enumerate(pieces) if piece.entered}
        sinks = remembering.rows(pieces, 3, torch.device("cpu")).sinks.tolist()
        for stream, piece in enumerate(pieces):
            assert sinks[stream] == [read[stream], *documents.ids(piece.document)[1:3]]
            begun += read[stream] == BEGIN and not piece.entered
    assert begun > 10


def test_a_model_without_such_a_token_reads_documents_as_they_are(tmp_path: Path) -> None:
    documents = Documents(texts(tmp_path, 1, 64), tokenizer(), 12)
    streams = Streams(documents, 1, BLOCKS, CHUNK, visit=1, seed=0)
    for _ in range(50):
        [piece] = streams.pieces()
        first = piece.begin * CHUNK
        assert (piece.ids == documents.ids(piece.document)[first : first + len(piece.ids)]).all()
