"""Small forms of what `make torture-workers` does."""

import pytest

from tests.proof.pass_through import GIB, pass_through
from tests.proof.workers import paced


@pytest.mark.parametrize(
    "same_host", [pytest.param(False, marks=pytest.mark.slow, id="streamed"), pytest.param(True, id="staged")]
)
def test_what_passes_through_does_not_stay_in_memory(host, tmp_path, same_host):
    passed = pass_through(host, tmp_path, GIB // 2, durability="os", **({"same_host": True} if same_host else {}))
    assert passed.holds, passed


@pytest.mark.slow
def test_eight_workers_count_exactly(host, tmp_path):
    report = paced(host, tmp_path, seconds=20)
    assert report.errors == []
    assert report.exact, report
    assert report.operations > 100
