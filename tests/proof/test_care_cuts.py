"""A power cut while a folder is backed up or restored leaves nothing that looks whole and is not."""

import pytest

from tests.faults.shim import Op
from tests.proof.care_cuts import SYNCS, broken, kind_of, record

MOST_CUTS = 60
NEEDED = [kind for kind, (_, reason) in SYNCS.items() if not reason]


@pytest.fixture(scope="module")
def recording(library, tmp_path_factory):
    return record(library, tmp_path_factory.mktemp("recording"))


@pytest.mark.parametrize("cuts", [8, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_power_cut_spoils_nothing(recording, cuts):
    assert list(broken(*recording, cuts, seed=cuts)) == []


def test_every_kind_of_sync_is_made(recording):
    root, log = recording
    assert {kind_of(change, root) for change in log if change.op is Op.SYNC} >= set(NEEDED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEEDED)
def test_a_missing_sync_is_found(recording, kind):
    found = next(broken(*recording, MOST_CUTS, seed=7, without=kind), None)
    assert found is not None, f"{MOST_CUTS} power cuts without a sync of the {kind} spoiled nothing"
