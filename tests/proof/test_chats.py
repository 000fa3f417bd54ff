"""Small forms of what `make torture` does with conversations over two workers."""

import pytest

from tests.proof.chat_kills import kill_chats
from tests.proof.crowd import crowd


@pytest.mark.slow
def test_conversations_side_by_side_lose_double_and_mix_nothing(host, tmp_path):
    found = crowd(host, tmp_path, seconds=20, conversations=6)
    assert found.wrong == []
    assert found.least >= 0.5, found


@pytest.mark.slow
def test_a_conversation_outlives_kills_of_workers_and_of_the_service(host, tmp_path):
    killed = kill_chats(host, tmp_path, kills=6, seed=1)
    assert killed.wrong == []
    assert killed.holds, killed
