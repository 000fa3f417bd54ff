"""What `--tls-client` says of callers."""

from memory_service.access import certificates


def test_names_may_have_the_characters_that_divide_an_entry() -> None:
    known = certificates.read(["spiffe://example.org/a=b:c=blue:write", "b=default:read", "a=default:admin"])
    caller = known.caller(["spiffe://example.org/a=b:c"])
    assert caller is not None
    assert (caller.tenant, caller.roles, caller.subject) == ("blue", {"write"}, "spiffe://example.org/a=b:c")
    assert known.caller(["x"]) is None
    first = known.caller(["a", "b", "x"])
    assert first is not None
    assert first.subject == "b", "the operator's order counts, and not the certificate's"
