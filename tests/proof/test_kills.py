"""Small forms of what `make torture` does."""

import pytest

import kvbank
from tests.proof.damage import damage
from tests.proof.kills import kill_often


def test_nothing_acknowledged_is_lost_when_the_service_is_killed(host, tmp_path):
    killed = kill_often(host, tmp_path, kills=2, seed=1, clients=2)
    assert killed.kills == 2
    assert killed.acknowledged > 50
    assert (killed.lost, killed.wrong) == ([], [])


@pytest.mark.parametrize("same_host", [False, True], ids=["stream", "files"])
def test_every_damaged_payload_is_noticed_and_none_is_served(host, tmp_path, same_host):
    service = host.start(tmp_path / "data", same_host=same_host)
    with kvbank.connect(service.address) as client:
        report = damage(client, tmp_path / "data", flips=20, seed=1, healthy=20)
    assert report.holds, report
    assert report.healthy == 20
    service.stop()
