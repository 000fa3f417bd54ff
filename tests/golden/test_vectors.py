"""KVBANK_GOLDEN that names nothing is an error, and not a run without tests."""

from pathlib import Path

import pytest

from tests.golden.vectors import KINDS, OWN, golden


def test_a_folder_without_vectors_is_an_error(tmp_path: Path) -> None:
    assert golden(None) == golden("") == OWN
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"KVBANK_GOLDEN: {folder} has none of the folders homer"):
            golden(str(folder))
    (tmp_path / KINDS[-1]).mkdir()
    assert golden(str(tmp_path)) == tmp_path
