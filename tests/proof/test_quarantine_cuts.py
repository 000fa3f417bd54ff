"""A power cut while damaged chunks are put into quarantine throws none of them away."""

import pytest

from tests.faults.shim import Op
from tests.proof.quarantine_cuts import SYNCS, broken, kind_of, record

MOST_CUTS = 60


@pytest.fixture(scope="module")
def recording(library, tmp_path_factory):
    return record(library, tmp_path_factory.mktemp("recording"))


@pytest.mark.parametrize("cuts", [8, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_power_cut_throws_nothing_away(recording, cuts):
    assert list(broken(*recording, cuts, seed=cuts)) == []


def test_every_kind_of_sync_is_made(recording):
    root, log = recording
    assert {kind_of(change, root) for change in log if change.op is Op.SYNC} >= set(SYNCS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SYNCS)
def test_a_missing_sync_is_found(recording, kind):
    found = next(broken(*recording, MOST_CUTS, seed=7, without=kind), None)
    assert found is not None, f"{MOST_CUTS} power cuts without a sync of the {kind} threw nothing away"
