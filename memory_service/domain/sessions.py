"""Sessions as plain values: conversations whose turns are kept in order, which one worker at a time may go on with.
This file owns the rules of leases and of numbering, over any engine.

A session is a line of *stretches*: turns of one branch up to some turn, then those of the next. A fork or a rewind
begins a new branch behind a turn, so that neither copies anything; turns are only ever added to a session's own last
branch. Times are in microseconds since 1970.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from memory_service.domain.errors import invalid, lease_held, lease_lost, turn_conflict
from memory_service.domain.tenants import DEFAULT_TENANT

TurnStatus = Literal["completed", "incomplete", "part", "forgotten"]

# The name of a session's bank, where it does not say one, begins so.
OWN_BANK = "session-"
_OWN_BANK = re.compile(OWN_BANK + "[0-9a-f]{16}")
# The filter of a session names all its stretches, and a message holds no more.
MOST_STRETCHES = 10_000
# The key in the metadata of a chunk that names the branch in which the chunk begins.
BRANCH = "branch"
# How long a lease lasts that does not say it, in microseconds.
LEASE_US = 30_000_000


@dataclass(frozen=True, slots=True)
class TurnPoint:
    """A turn of a session, by its number; 0 is the place before the first."""

    session_id: str
    turn: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """The turns of one branch that a session has, up to the number `last`. end: the tokens of the session up to there;
    None for the branch to which new turns go."""

    branch: str
    last: int
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of a worker to go on with a session, until it `expires`. ttl: how long a renewal makes it last, in
    microseconds."""

    holder: str
    epoch: int
    expires: int
    ttl: int = LEASE_US


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation, without its turns.

    ttl: how long it is kept after its last turn, in microseconds; 0 for ever. branch: that of new turns. epoch: that of
    the last lease, also when it has ended; 0 before the first. stretches: as far as they were read.
    """

    session_id: str
    name: str
    bank: str
    reads: tuple[str, ...] = ()
    reader_digest: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    ttl: int = 0
    tenant: str = DEFAULT_TENANT
    branch: str = ""
    head: int = 0
    tokens: int = 0
    forked_from: TurnPoint | None = None
    created: int = 0
    updated: int = 0
    expires: int | None = None
    epoch: int = 0
    lease: Lease | None = None
    stretches: tuple[Stretch, ...] = ()

    @property
    def has_own_bank(self) -> bool:
        """Tell whether the bank has such a name as `own_bank` gives, and not one that somebody chose."""
        return _OWN_BANK.fullmatch(self.bank) is not None


@dataclass(frozen=True, slots=True)
class Item:
    """What was said, called or answered in a turn. json: the whole item as its maker wrote it, where it is more than a
    text."""

    id: str
    role: str
    text: str
    json: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a session. `token_ids` is uint32 LE [token_count], or empty where the ids were not read; `start` counts
    the tokens of the session before it, `prompt_tokens` those of it that are not of the answer, `kept` those of the
    session that were safe in its bank when it was appended."""

    status: TurnStatus
    items: tuple[Item, ...]
    token_ids: bytes
    prompt_tokens: int = 0
    kept: int = 0
    usage: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    number: int = 0
    start: int = 0
    token_count: int = 0
    created: int = 0
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """What is known of a session's local window after a turn. size: in bytes. checksum: xxh3-64 of them."""

    session_id: str
    turn: int
    stamp: str
    size: int
    checksum: int


def new_session_id() -> str:
    """Return an id for a session, which cannot be guessed."""
    return secrets.token_hex(16)


def new_branch() -> str:
    """Return the name of a branch."""
    return secrets.token_hex(8)


def own_bank(session_id: str) -> str:
    """Return the name of the bank of a session that does not say one."""
    return OWN_BANK + session_id[:16]


# Leases


def current_lease(session: Session, now: int) -> Lease | None:
    """Return the lease that a session is under; None where there is none, or it has ended."""
    return session.lease if session.lease is not None and now < session.lease.expires else None


def acquired(session: Session, holder: str, ttl: int, now: int) -> Session:
    """Return a session with a new lease, which ends every earlier one. Errors: LEASE_HELD, while another holder has
    one."""
    held = current_lease(session, now)
    if held is not None and held.holder != holder:
        raise lease_held(session.session_id, held.holder, (held.expires - now) / 1e6)
    epoch = session.epoch + 1
    return replace(session, epoch=epoch, lease=Lease(holder, epoch, now + ttl, ttl))


def check_lease(session: Session, epoch: int, now: int) -> Lease:
    """Return the lease of this epoch. Errors: LEASE_LOST where it has ended, or another one was given since."""
    lease = current_lease(session, now)
    if lease is None or lease.epoch != epoch:
        raise lease_lost(session.session_id, epoch)
    return lease


def renewed(session: Session, epoch: int, ttl: int | None, now: int) -> Session:
    """Return a session whose lease begins anew. ttl: in microseconds; None for that which it had. Errors:
    LEASE_LOST."""
    lease = check_lease(session, epoch, now)
    ttl = lease.ttl if ttl is None else ttl
    return replace(session, lease=replace(lease, expires=now + ttl, ttl=ttl))


def released(session: Session, epoch: int) -> Session:
    """Return a session without a lease; one that has ended by itself may be released too. Errors: LEASE_LOST where
    another one was given since."""
    if session.epoch != epoch:
        raise lease_lost(session.session_id, epoch)
    return replace(session, lease=None)


def fenced(session: Session) -> Session:
    """Return a session that no worker has, and that no earlier lease is good for: its turns are others now."""
    return replace(session, epoch=session.epoch + 1, lease=None)


# Turns


def check_follows(session: Session, follows: int) -> None:
    """Refuse turns that do not follow the last one. Errors: TURN_CONFLICT."""
    if follows != session.head:
        raise turn_conflict(session.session_id, follows, session.head)


def appended(session: Session, turns: Sequence[Turn], now: int) -> tuple[Session, list[Turn]]:
    """Return a session with turns behind its last one, and these turns with number, start, time and key."""
    made: list[Turn] = []
    head, tokens = session.head, session.tokens
    for turn in turns:
        head += 1
        placed = replace(turn, number=head, start=tokens, created=now, session_id=session.session_id)
        made.append(replace(placed, key=turn.key or secrets.token_hex(16)))
        tokens += turn.token_count
    return lasting(replace(session, head=head, tokens=tokens, updated=now), now), made


def lasting(session: Session, now: int) -> Session:
    """Return a session that is kept for its `ttl` from now on."""
    return replace(session, expires=now + session.ttl if session.ttl else None)


def line_behind(line: Sequence[Stretch], turn: int, tokens: int, branch: str) -> tuple[Stretch, ...]:
    """Return the stretches of a session that goes on behind a turn of a line. tokens: up to and with that turn. branch:
    of its new turns. Errors: INVALID_FIELD, where there would be too many."""
    kept: list[Stretch] = []
    for stretch in line if turn else ():
        if stretch.last >= turn:
            kept.append(Stretch(stretch.branch, turn, tokens))
            break
        kept.append(stretch)
    if len(kept) + 1 > MOST_STRETCHES:
        text = f"the session would be of {len(kept) + 1} stretches, and has at most {MOST_STRETCHES}"
        raise invalid("turn", f"{text}; export it and import it as a new one")
    return (*kept, Stretch(branch, turn))
