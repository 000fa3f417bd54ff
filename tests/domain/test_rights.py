"""What each role may do, and which banks a caller may name."""

from typing import get_args

import pytest

from kvbank.v1 import access_pb2, service_pb2, session_pb2
from memory_service.domain.access import EVERY_BANK, ApiKey, Caller, Right, Role
from memory_service.domain.rights import RIGHTS

# What a role may do, written once more by hand.
MAY: dict[str, set[str]] = {
    "read": {"known", "read"},
    "write": {"known", "read", "write", "forget"},
    "admin": {"known", "read", "write", "forget", "admin", "keys"},
    "operator": {"known", "forget", "keys", "operate"},
}


def caller(role: Role, banks: tuple[str, ...] = EVERY_BANK) -> Caller:
    return Caller("a", frozenset({role}), banks, "k")


def test_every_method_of_the_wire_asks_for_a_right() -> None:
    files = (service_pb2.DESCRIPTOR, access_pb2.DESCRIPTOR, session_pb2.DESCRIPTOR)
    services = [service for file in files for service in file.services_by_name.values()]
    methods = [method.name for service in services for method in service.methods]
    assert sorted([*methods, "ServerReflectionInfo"]) == sorted(RIGHTS)


@pytest.mark.parametrize("role", get_args(Role))
def test_a_role_has_its_rights_and_no_other(role: Role) -> None:
    assert {right for right in get_args(Right) if caller(role).may(right)} == MAY[role]


def test_the_owner_may_do_everything() -> None:
    assert all(Caller.owner().may(right) for right in get_args(Right))
    assert Caller.owner().may_manage("any")


def test_a_caller_without_a_role_may_do_nothing() -> None:
    assert not any(Caller("a", frozenset()).may(right) for right in get_args(Right))


@pytest.mark.parametrize(
    ("patterns", "bank", "may"),
    [
        (("*",), "anything", True),
        (("team-*",), "team-notes", True),
        (("team-*",), "Team-notes", False),
        (("team-*",), "other", False),
        (("a", "b?"), "b1", True),
        (("a", "b?"), "b12", False),
        (("*", "x"), "y", True),
        (("a*",), "a\nb", True),
        ((), "a", False),
    ],
)
def test_banks_are_named_by_patterns(patterns: tuple[str, ...], bank: str, may: bool) -> None:
    assert caller("read", patterns).may_use(bank) is may


def test_keys_are_managed_by_admins_of_all_banks_of_their_tenant_and_by_operators() -> None:
    assert caller("admin").may_manage("a")
    assert not caller("admin").may_manage("b")
    assert not caller("admin", ("team-*",)).may_manage("a")
    assert not caller("write").may_manage("a")
    assert not caller("admin").may_manage("a", "operator")
    assert caller("operator").may_manage("b", "operator")
    assert caller("operator").may_manage("b")


@pytest.mark.parametrize(
    ("ends", "valid"),
    [
        ((None, None), True),
        ((101, None), True),
        ((100, None), False),
        ((None, 50), False),
        ((None, 101), True),
        ((101, 100), False),
    ],
)
def test_a_key_is_valid_until_it_expires_or_is_revoked(ends: tuple[int | None, int | None], valid: bool) -> None:
    assert ApiKey("i", "a", "read", b"", expires=ends[0], revoked=ends[1]).valid(100) is valid


def test_what_is_printed_of_a_key_tells_nothing_of_its_secret() -> None:
    assert "0123" not in repr(ApiKey("i", "a", "read", b"0123"))
