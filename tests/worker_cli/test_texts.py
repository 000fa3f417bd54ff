"""Texts that a person names: read whole or refused, never without end."""

import gzip
from pathlib import Path

import pytest

from model_worker.errors import InputError
from model_worker.text_files import read_text


def test_texts_are_read_whole(tmp_path: Path) -> None:
    """Also where the end of a piece, which has 4 MiB, is in the middle of a character."""
    text = "begin" + "naïve\r\n" * 1_300_000
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode(), compresslevel=1))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.gz") == text


def test_a_mark_of_the_encoding_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffnaïve".encode())
    assert read_text(tmp_path / "a.txt") == "naïve"


def test_what_never_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    for path in (Path("/dev/zero"), tmp_path / "bomb.gz"):
        with pytest.raises(InputError, match="has more than 1,048,576 bytes"):
            read_text(path, largest=1 << 20)
