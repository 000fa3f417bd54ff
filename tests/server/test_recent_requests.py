"""A repeated retrieval counts once."""

from types import SimpleNamespace

from kvbank._transport import channel
from memory_service.operations import reading


def test_a_request_is_remembered_as_long_as_it_is_repeated_and_so_many_at_most(monkeypatch):
    """The SDK gives two minutes to each step of a retrieval, and every step may call again."""
    now = [0.0]
    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(reading, "MOST_REMEMBERED", 3)
    requests = reading.RecentRequests()
    assert reading.REMEMBERED_S > 2 * channel.DEFAULT_STREAM_TIMEOUT
    assert requests.first(b"a")
    for _ in range(9):
        now[0] += reading.REMEMBERED_S
        assert not requests.first(b"a")
    now[0] += reading.REMEMBERED_S + 1
    assert requests.first(b"a")
    assert [requests.first(key) for key in (b"b", b"c", b"a", b"d")] == [True, True, False, True]
    assert [requests.first(key) for key in (b"a", b"c", b"d", b"b")] == [False, False, False, True]
