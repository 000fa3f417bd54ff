"""The rules of sessions that need no store."""

import pytest

from memory_service.domain.errors import ServiceError
from memory_service.domain.sessions import MOST_STRETCHES, Stretch, line_behind


def test_a_line_has_only_so_many_stretches_as_a_filter_names() -> None:
    line = tuple(Stretch(f"b{number}", number + 1, number) for number in range(MOST_STRETCHES))
    longest = line_behind(line, MOST_STRETCHES - 1, 0, "new")
    assert len(longest) == MOST_STRETCHES
    assert longest[-1] == Stretch("new", MOST_STRETCHES - 1)
    with pytest.raises(ServiceError, match="10001 stretches") as refused:
        line_behind(line, MOST_STRETCHES, 0, "new")
    assert refused.value.reason == "INVALID_FIELD"
