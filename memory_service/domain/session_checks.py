"""The checks of what a request says of sessions and turns. This file owns their bounds: every turn, with its token ids,
and every session fit in a message of the smallest size that a service can have."""

from collections.abc import Mapping, Sequence

from memory_service.domain import validate
from memory_service.domain.errors import invalid
from memory_service.domain.sessions import Item, Session, Turn, Window
from memory_service.domain.validate import LARGEST_NAME, LARGEST_TTL, LARGEST_WORD

MOST_READS = 99
MOST_PAIRS, LONGEST_PAIR_KEY, LONGEST_PAIR_VALUE = 16, 64, 512
# Of a session: those of its users, and a few that its worker notes beside them.
MOST_SESSION_PAIRS = MOST_PAIRS + 4
# A value of a turn's metadata, which may say why the answer came, and the bytes of all metadata of a turn.
LONGEST_TURN_VALUE = 16 * 1024
LARGEST_TURN_METADATA = 64 * 1024
# Bytes of all settings of a session.
LARGEST_SETTINGS = 16 * 1024
# The turns of one request, the items of a turn, their bytes, the tokens of a turn, and its figures of usage.
MOST_TURNS = 100
MOST_ITEMS = 1000
LARGEST_ITEMS = 2 * 1024 * 1024
MOST_TOKENS = 262_144
MOST_USAGE = 64
LONGEST_KEY = 64
# A lease, in microseconds.
SHORTEST_LEASE, LONGEST_LEASE = 1_000_000, 600_000_000
# Bytes of a window.
LARGEST_WINDOW = 4 * 1024 * 1024 * 1024


def session(new: Session) -> None:
    """Check a session that is to be made or changed. Errors: INVALID_FIELD."""
    if new.name:
        validate.name("session.name", new.name)
    validate.name("session.bank", new.bank)
    if len(new.reads) > MOST_READS or len(set(new.reads)) != len(new.reads):
        raise invalid("session.reads", f"must name at most {MOST_READS} banks, each once")
    for bank in new.reads:
        validate.name("session.reads", bank)
    if (size := len(new.reader_digest.encode())) > LARGEST_WORD:
        raise invalid("session.reader_digest", f"has {size} bytes; at most {LARGEST_WORD} are taken")
    if (size := pairs_bytes(new.settings)) > LARGEST_SETTINGS:
        raise invalid("session.settings", f"have {size} bytes; at most {LARGEST_SETTINGS} are taken")
    pairs("session.metadata", new.metadata, most=MOST_SESSION_PAIRS)
    if not 0 <= new.ttl <= LARGEST_TTL:
        raise invalid("ttl", "must be from 0 (kept for ever) to 1000 years")


def pairs(field: str, given: Mapping[str, str], longest: int = LONGEST_PAIR_VALUE, most: int = MOST_PAIRS) -> None:
    """Check metadata of a session or a turn. longest: letters of a value. most: pairs. Errors: INVALID_FIELD."""
    if len(given) > most:
        raise invalid(field, f"has {len(given)} pairs; at most {most} are taken")
    for key, value in given.items():
        if not 1 <= len(key) <= LONGEST_PAIR_KEY or len(value) > longest:
            text = f"must have keys of 1 to {LONGEST_PAIR_KEY} letters and values of at most {longest}"
            raise invalid(field, text)
    if any("\0" in text for pair in given.items() for text in pair):
        raise invalid(field, "has a NUL character: what is behind it could not be searched for")


def pairs_bytes(given: Mapping[str, str]) -> int:
    """Return the bytes of the words of settings or metadata."""
    return sum(len(word.encode()) for pair in given.items() for word in pair)


def turns(given: Sequence[Turn]) -> None:
    """Check turns that are to be appended. Errors: INVALID_FIELD."""
    if not 1 <= len(given) <= MOST_TURNS:
        raise invalid("turns", f"must be 1 to {MOST_TURNS}, are {len(given)}")
    for each in given:
        turn(each)
    keys = [each.key for each in given if each.key]
    if len(set(keys)) != len(keys):
        raise invalid("turns.key", "must be another one for each turn")


def turn(new: Turn) -> None:
    """Check a turn that is to be appended. Errors: INVALID_FIELD."""
    if new.key:
        key("turns.key", new.key)
    if new.status == "forgotten":
        raise invalid("turns.status", "must be COMPLETED, INCOMPLETE or PART")
    if new.token_count > MOST_TOKENS:
        raise invalid("turns.token_ids", f"are {new.token_count}; at most {MOST_TOKENS} are taken, as parts of a turn")
    if not 0 <= new.prompt_tokens <= new.token_count:
        raise invalid("turns.prompt_tokens", f"is {new.prompt_tokens}, and the turn has {new.token_count} tokens")
    if new.kept < 0:
        raise invalid("turns.kept", "must not be negative")
    if len(new.usage) > MOST_USAGE or any(not 1 <= len(name) <= LONGEST_PAIR_KEY for name in new.usage):
        raise invalid("turns.usage", f"must have at most {MOST_USAGE} names of 1 to {LONGEST_PAIR_KEY} letters")
    pairs("turns.metadata", new.metadata, LONGEST_TURN_VALUE)
    if (size := pairs_bytes(new.metadata)) > LARGEST_TURN_METADATA:
        raise invalid("turns.metadata", f"have {size} bytes; at most {LARGEST_TURN_METADATA} are taken")
    _items(new.items)


def _items(given: Sequence[Item]) -> None:
    if len(given) > MOST_ITEMS:
        raise invalid("turns.items", f"are {len(given)}; at most {MOST_ITEMS} are taken")
    if any(len(item.id) > LONGEST_KEY or len(item.role) > LONGEST_KEY for item in given):
        raise invalid("turns.items", f"must have ids and roles of at most {LONGEST_KEY} letters")
    if (size := items_bytes(given)) > LARGEST_ITEMS:
        raise invalid("turns.items", f"have {size} bytes; at most {LARGEST_ITEMS} are taken")


def items_bytes(given: Sequence[Item]) -> int:
    """Return the bytes of the words of items."""
    return sum(len(text.encode()) for item in given for text in (item.id, item.role, item.text, item.json))


def key(field: str, given: str) -> None:
    """Check the key of a turn. Errors: INVALID_FIELD."""
    if not 1 <= len(given) <= LONGEST_KEY or not given.isprintable():
        raise invalid(field, f"must have 1 to {LONGEST_KEY} printable characters")


def holder(given: str) -> None:
    """Check how a worker calls itself. Errors: INVALID_FIELD."""
    if not 1 <= len(given) <= LARGEST_NAME or not given.isprintable():
        raise invalid("holder", f"must have 1 to {LARGEST_NAME} printable characters")


def lease_ttl(given: int) -> None:
    """Check how long a lease is to last, in microseconds. Errors: INVALID_FIELD."""
    if not SHORTEST_LEASE <= given <= LONGEST_LEASE:
        raise invalid("ttl", "must be from 1 s to 10 min")


def window(new: Window) -> None:
    """Check what is said of a window before its bytes come. Errors: INVALID_FIELD."""
    if not 1 <= new.size <= LARGEST_WINDOW:
        raise invalid("header.size", f"is {new.size} bytes; 1 to {LARGEST_WINDOW} are taken")
    if len(new.stamp.encode()) > LARGEST_WORD:
        raise invalid("header.stamp", f"must have at most {LARGEST_WORD} bytes")
