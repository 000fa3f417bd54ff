"""Callers that show a token of an identity provider (JWT). This file owns what a token must have: a signature of a
known key by one of two algorithms, an end, this service as its audience, and a tenant and a role in the claims that
the operator has named.

The keys of the provider come from a file, or over https. They are fetched anew when they are old, and when a token
names one that is not among them; but seldom, because anybody can make such tokens.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
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
    """Tells callers by their tokens. Threads share it; all methods block."""

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
        self._keys: Any = None
        self._fetched = -math.inf
        if not issuer.jwks.startswith("https://"):
            try:
                self._keys = self._read()
            except (OSError, ValueError, jwt.PyJWTError) as error:
                why = getattr(error, "strerror", None) or error
                raise StartError(f"--jwt-jwks: cannot use the keys of {issuer.jwks}: {why}") from None

    def verify(self, credential: str) -> Caller | None:
        """Return the caller that a token says, and its end; None for one that is not valid, or has no tenant or no
        role."""
        jwt, issuer = self._jwt, self._issuer
        try:
            key = self._key(jwt.get_unverified_header(credential))
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
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            return None

    def _said(self, claims: Mapping[str, Any]) -> Caller | None:
        tenant, role = claims.get(self._issuer.tenant_claim), claims.get(self._issuer.role_claim)
        # A name that was said twice, or is of another kind, is none.
        if not isinstance(tenant, str) or not tenant or role not in get_args(Role):
            return None
        subject = claims.get("sub")
        named = subject[:_LONGEST] if isinstance(subject, str) else ""
        return Caller(tenant, frozenset({cast(Role, role)}), subject=named, ends=int(claims["exp"]) * SECOND)

    def _key(self, header: Mapping[str, Any]) -> Any:
        """Return the key that a token names, or the only one where it names none; None where there is no such key."""
        wanted = header.get("kid")
        found = _among(self._fresh(self._limits.token_keys_old_s, wait=False), wanted)
        return _among(self._fresh(self._limits.token_keys_seldom_s, wait=True), wanted) if found is None else found

    def _fresh(self, age: float, *, wait: bool) -> list[Any]:
        """Return the keys, fetched anew where they are older than `age` seconds. Where that fails, those of before are
        gone on with; so they are while another thread fetches them, unless this one is to wait for that."""
        if self._lock.acquire(blocking=wait or self._keys is None):
            try:
                self._fetch(age)
            finally:
                self._lock.release()
        return list(self._keys.keys) if self._keys is not None else []

    def _fetch(self, age: float) -> None:
        """Fetch the keys where they are older than `age` seconds."""
        if time.monotonic() - self._fetched < age:
            return
        self._fetched = time.monotonic()
        try:
            self._keys = self._read()
        except Exception as error:
            self._failures.error(_log, error, "cannot fetch the keys of tokens from %s", self._issuer.jwks)

    def _read(self) -> Any:
        """Read the keys of the provider. Errors: OSError, ValueError, PyJWTError."""
        jwt, source = self._jwt, self._issuer.jwks
        if source.startswith("https://"):
            return jwt.PyJWKClient(
                source, cache_jwk_set=False, timeout=self._limits.token_keys_patience_s
            ).get_jwk_set()
        with Path(source).open("rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
        if not isinstance(found, dict):
            raise ValueError("it is no set of keys")
        return jwt.PyJWKSet.from_dict(found)


def _among(keys: Iterable[Any], wanted: object) -> Any:
    """Return the key for signatures that has this name, or the only one where no name is wanted; None where there is no
    such key."""
    signing = [key for key in keys if key.public_key_use in (None, "sig")]
    if wanted is None:
        return signing[0] if len(signing) == 1 else None
    return next((key for key in signing if key.key_id == wanted), None)
