"""Small forms of what `make torture` does around two services on one database."""

import pytest

from tests.proof.cluster_faults import FAULTS
from tests.proof.replicas import torment
from tests.proof.workers import paced_together
from tests.support.engines import ENGINES

KIND = ENGINES["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())]


def test_nothing_acknowledged_is_lost_whatever_fails(host, tmp_path):
    survived = torment(host, tmp_path, rounds=len(FAULTS), seed=1)
    assert survived.holds, survived
    assert survived.acknowledged > 100
    assert survived.evicted


def test_eight_workers_share_two_services_and_count_exactly(host, tmp_path):
    report = paced_together(host, tmp_path, seconds=20)
    assert report.errors == []
    assert report.exact, report
    assert report.spread < 0.1, report
