"""Callers that show a token of an identity provider (JWT). This file owns what a token must have: a signature of a
known key by one of two algorithms, an end, this service as its audience, and a tenant and a role in the claims that
the operator has named.

The keys of the provider come from a file, or over https. They are fetched anew when they are old, and when a token
names one that is not among them; but seldom, because anybody can make such tokens, and in a thread of its own, which
no other caller waits for.
"""

import json
import logging
import math
import threading
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from memory_service.domain.access import Caller, Role
from memory_service.domain.clock import SECOND
from memory_service.domain.errors import StartError
from memory_service.domain.limits import STANDARD, Limits
from memory_service.observe.seldom import Repeating

ALGORITHMS = ("EdDSA", "RS256")
# Seconds by which the clock of the provider may be ahead of ours.
_AHEAD_S = 30.0
_MOST_BYTES = 1 << 20
# Characters of the name of a caller that are kept.
_LONGEST = 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Issuer:
    """What an operator says of tokens.

    jwks: the file of the keys, or their address. audience: this service, as tokens name it. issuer: who must have made
    them; "" for anybody who has a key. tenant_claim, role_claim: the names of the claims that say what a caller may do.
    """

    jwks: str
    audience: str
    issuer: str
    tenant_claim: str
    role_claim: str


class Tokens:
    """Tells callers by their tokens. Threads share it."""

    def __init__(self, issuer: Issuer, limits: Limits = STANDARD) -> None:
        """Fetch the keys for the first time. Errors: StartError for a file that cannot be used, and where pyjwt is not
        installed."""
        try:
            import jwt
        except ModuleNotFoundError:
            raise StartError("--jwt-jwks needs pyjwt: pip install 'kvbank[jwt]'") from None
        self._jwt, self._issuer, self._limits = jwt, issuer, limits
        self._lock = threading.Lock()
        self._failures = Repeating()
        self._keys = list[Any]()
        self._fetching, self._fetched = _done(), -math.inf
        if not issuer.jwks.startswith("https://"):
            try:
                self._keys = self._read()
            except (OSError, ValueError, jwt.PyJWTError) as error:
                why = getattr(error, "strerror", None) or error
                raise StartError(f"--jwt-jwks: cannot use the keys of {issuer.jwks}: {why}") from None

    def fetch_for(self, credential: str) -> "Future[None] | None":
        """Return the fetching of keys that a token is to wait for, at most `Limits.token_keys_patience_s`; None where
        it can be verified now. The first token that finds the keys old has them fetched, and others go on by those of
        before; one whose key is not among them waits for the next ones, unless they came a short while ago."""
        try:
            known = self._key(credential) is not None
        except self._unreadable:
            return None
        with self._lock:
            if not self._fetching.done():
                return None if known else self._fetching
            age = self._limits.token_keys_old_s if known else self._limits.token_keys_seldom_s
            if time.monotonic() - self._fetched < age:
                return None
            fetching = Future[None]()
            threading.Thread(target=self._fetch, args=[fetching], name="kvbank-token-keys", daemon=True).start()
            # Last, because a machine that has no thread left must not be waited for until the end of the service.
            self._fetched, self._fetching = time.monotonic(), fetching
            return fetching

    def verify(self, credential: str) -> Caller | None:
        """Return the caller that a token says, and its end, by the keys that are there; None for one that is not valid,
        or has no tenant or no role."""
        jwt, issuer = self._jwt, self._issuer
        try:
            key = self._key(credential)
            if key is None or key.algorithm_name not in ALGORITHMS:
                return None
            required = ["exp", "aud", *(["iss"] if issuer.issuer else [])]
            claims = jwt.decode(
                credential,
                key,
                algorithms=list(ALGORITHMS),
                audience=issuer.audience,
                issuer=issuer.issuer or None,
                leeway=_AHEAD_S,
                options={"require": required, "enforce_minimum_key_length": True},
            )
            return self._said(claims)
        except self._unreadable:
            return None

    def _said(self, claims: Mapping[str, Any]) -> Caller | None:
        tenant, role = claims.get(self._issuer.tenant_claim), claims.get(self._issuer.role_claim)
        # A name that was said twice, or is of another kind, is none.
        if not isinstance(tenant, str) or not tenant or role not in get_args(Role):
            return None
        subject = claims.get("sub")
        named = subject[:_LONGEST] if isinstance(subject, str) else ""
        return Caller(tenant, frozenset({cast(Role, role)}), subject=named, ends=int(claims["exp"]) * SECOND)

    @property
    def _unreadable(self) -> tuple[type[Exception], ...]:
        """Return the errors of a token that cannot be read, or is not valid."""
        return (self._jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)

    def _key(self, credential: str) -> Any:
        """Return the key that a token names, or the only one where it names none; None where there is no such key."""
        wanted = self._jwt.get_unverified_header(credential).get("kid")
        signing = [key for key in self._keys if key.public_key_use in (None, "sig")]
        if wanted is None:
            return signing[0] if len(signing) == 1 else None
        return next((key for key in signing if key.key_id == wanted), None)

    def _fetch(self, done: "Future[None]") -> None:
        """Fetch the keys of the provider; where that fails, those of before stay."""
        try:
            self._keys = self._read()
        except Exception as error:
            self._failures.error(_log, error, "cannot fetch the keys of tokens from %s", self._issuer.jwks)
        done.set_result(None)

    def _read(self) -> list[Any]:
        """Read the keys of the provider. Errors: OSError, ValueError, PyJWTError."""
        source = self._issuer.jwks
        if source.startswith("https://"):
            content = _downloaded(source, self._limits.token_keys_patience_s)
        else:
            with Path(source).open("rb") as file:
                content = file.read(_MOST_BYTES)
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it is no set of keys")
        return list(self._jwt.PyJWKSet.from_dict(found).keys)


def _downloaded(address: str, patience_s: float) -> bytes:
    """Return what an https address answers. Errors: OSError, ValueError for more than `_MOST_BYTES`, and for an answer
    that takes longer than the patience, or came another way."""
    end, content = time.monotonic() + patience_s, b""
    with urllib.request.urlopen(address, timeout=patience_s) as answer:
        if not answer.url.startswith("https://"):
            raise ValueError("it leads to an address without https")
        while piece := answer.read1(_MOST_BYTES):
            content += piece
            if len(content) > _MOST_BYTES:
                raise ValueError(f"it has more than {_MOST_BYTES} bytes")
            if time.monotonic() > end:
                raise ValueError(f"it has not ended after {patience_s:g} s")
    return content


def _done() -> "Future[None]":
    done: Future[None] = Future()
    done.set_result(None)
    return done
