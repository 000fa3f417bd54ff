"""The ids of conversations: `conv_` and the id of the session that a conversation is (pure)."""

import re

import kvbank

_CONVERSATION = re.compile(r"conv_([0-9a-f]{32})")


def session_id_of(conversation: str) -> str:
    """Return the id of the session that a conversation is. Raises kvbank.SessionNotFound for an id that is none."""
    found = _CONVERSATION.fullmatch(conversation)
    if found is None:
        raise kvbank.SessionNotFound("this is not the id of a conversation")
    return found[1]


def conversation_id(session_id: str) -> str:
    """Return the id of the conversation that a session is."""
    return f"conv_{session_id}"
