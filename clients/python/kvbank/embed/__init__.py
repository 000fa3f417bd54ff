"""Embedders turn texts into the vectors by which chunks are found. Those of this package need no model: they hash
words, or are functions of the caller's; encoders are the worker's."""

from kvbank.embed.base import Embedder, Vectors, embedded, embedded_queries, name_of, of_bank
from kvbank.embed.callable import CallableEmbedder
from kvbank.embed.lexical import LexicalEmbedder
from kvbank.embed.spec import AnyEmbedder, embedder

__all__ = [
    "AnyEmbedder",
    "CallableEmbedder",
    "Embedder",
    "LexicalEmbedder",
    "Vectors",
    "embedded",
    "embedded_queries",
    "embedder",
    "name_of",
    "of_bank",
]
