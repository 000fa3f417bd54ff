"""A power cut at any moment costs nothing that was acknowledged, and every single sync is needed for that."""

import random

import pytest

from tests.faults.power_cut import Left, replay
from tests.faults.shim import Op
from tests.proof.power_cuts import SYNCS, Recording, broken, record
from tests.support.synced import is_synced_as_a_whole, skip_where_files_are_synced_one_by_one

CUTS = 12
MOST_CUTS = 120
NEEDED = [kind for kind, (_, reason) in SYNCS.items() if not reason]


@pytest.fixture(scope="module")
def recording(library, tmp_path_factory) -> Recording:
    return record(library, tmp_path_factory.mktemp("recording"))


def test_the_log_of_the_fault_layer_is_whole(recording, tmp_path, contents):
    """Working out a cut after the end, with everything written back, gives what the folder holds."""
    replay(recording.root, recording.records).write_out(tmp_path / "again", Left.ALL, random.Random(0))
    assert contents(tmp_path / "again") == contents(recording.root)


def test_every_kind_of_sync_is_known_and_made(recording):
    kinds = {recording.kind(change) for change in recording.records if change.op is Op.SYNC}
    assert kinds >= {kind for kind in NEEDED if kind != "whole disk" or is_synced_as_a_whole(recording.root)}


def test_staged_files_were_taken_over(recording):
    """Staged files are made by the clients, which sync nothing."""
    assert any(change.op is Op.RENAME and "/staging/" in change.path for change in recording.records)


def test_a_power_cut_loses_nothing(recording):
    assert [found for found in broken(recording, CUTS, seed=3) if found] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEEDED)
def test_a_missing_sync_is_found(recording, kind):
    if kind == "whole disk":
        skip_where_files_are_synced_one_by_one(recording.root)
    found = next((found for found in broken(recording, MOST_CUTS, seed=5, without=kind) if found), None)
    assert found is not None, f"{MOST_CUTS} power cuts without a sync of the {kind} lost nothing"
