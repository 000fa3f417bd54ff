"""Embedders turn texts into the vectors by which chunks are found; one method a file."""

from kvbank.embed.lexical import LexicalEmbedder
from model_worker.embed.base import Embedder, embedded, embedded_queries, name_of, of_bank
from model_worker.embed.callable import CallableEmbedder
from model_worker.embed.encoder import EncoderEmbedder
from model_worker.embed.hybrid import HybridEmbedder
from model_worker.embed.spec import AnyEmbedder, embedder

__all__ = [
    "AnyEmbedder",
    "CallableEmbedder",
    "Embedder",
    "EncoderEmbedder",
    "HybridEmbedder",
    "LexicalEmbedder",
    "embedded",
    "embedded_queries",
    "embedder",
    "name_of",
    "of_bank",
]
