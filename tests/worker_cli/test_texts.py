"""Texts that a person names: read whole or refused, never without end."""

import gzip
from pathlib import Path

import pytest

from model_worker.errors import InputError
from model_worker.evaluate import texts
from model_worker.evaluate.texts import read_text


def test_texts_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE", 5)
    (tmp_path / "a.txt").write_text("naïve\r\n" * 9, newline="")
    (tmp_path / "a.gz").write_bytes(gzip.compress("naïve\r\n".encode() * 9))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.gz") == "naïve\r\n" * 9


def test_a_mark_of_the_encoding_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffnaïve".encode())
    assert read_text(tmp_path / "a.txt") == "naïve"


def test_what_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LARGEST", 1 << 20)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    for path in (Path("/dev/zero"), tmp_path / "bomb.gz"):
        with pytest.raises(InputError, match="has more than 1,048,576 bytes"):
            read_text(path)
