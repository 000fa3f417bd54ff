"""A repeated retrieval counts once, whatever other tenants ask."""

from kvbank._transport.channel import DEFAULT_STREAM_TIMEOUT
from memory_service.operations.recent import REMEMBERED_S, RecentRequests


def test_a_request_is_remembered_as_long_as_it_is_repeated_and_so_many_at_most():
    """Steps of a retrieval have two minutes each in the SDK, and every step may call again."""
    now = [0.0]
    requests = RecentRequests(3, clock=lambda: now[0])
    assert 2 * DEFAULT_STREAM_TIMEOUT < REMEMBERED_S
    assert requests.first("red", b"a")
    for _ in range(9):
        now[0] += REMEMBERED_S
        assert not requests.first("red", b"a")
    now[0] += REMEMBERED_S + 1
    assert requests.first("red", b"a")
    assert [requests.first("red", key) for key in (b"b", b"c", b"a", b"d")] == [True, True, False, True]
    assert [requests.first("red", key) for key in (b"a", b"c", b"d", b"b")] == [False, False, False, True]


def test_a_tenant_neither_repeats_nor_pushes_out_the_requests_of_another():
    now = [0.0]
    requests = RecentRequests(3, clock=lambda: now[0])
    assert requests.first("red", b"a")
    assert requests.first("blue", b"a")
    for number in range(9):
        assert requests.first("blue", b"%d" % number)
    assert not requests.first("red", b"a")
    now[0] += REMEMBERED_S + 1
    assert requests.first("green", b"a")
    assert requests.first("red", b"a")
