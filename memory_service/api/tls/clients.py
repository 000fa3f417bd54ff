"""Certificates of clients that have connected already. This file owns that such a certificate counts for as long as the
authorities of now would let its client connect once more: it has been checked by TLS when the connection was made, but
since then it may have expired, and the file of the authorities may have changed.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509

# Certificates that a client shows; more are not looked at, because each costs the event loop some time.
_LONGEST_CHAIN = 10


@lru_cache(1024)
def valid_until(shown: bytes, authorities: bytes) -> float:
    """Return until when (seconds since 1970) a certificate is valid by the authorities, -inf where it is of none.

    shown: what a client has shown, PEM: its certificate, then those that this was signed by. authorities: PEM. TLS has
    asked before what else there is to ask of certificates.
    """
    from cryptography import x509  # here, because a service without TLS can do without 10 MiB

    try:
        certificate, *between = x509.load_pem_x509_certificates(shown)[:_LONGEST_CHAIN]
        trusted = x509.load_pem_x509_certificates(authorities)
    except ValueError:
        return float("-inf")
    until = float("inf")
    for _ in range(_LONGEST_CHAIN):
        until = min(until, certificate.not_valid_after_utc.timestamp())
        for authority in trusted:
            if _signed(authority, certificate):
                return min(until, authority.not_valid_after_utc.timestamp())
        signer = next((each for each in between if _signed(each, certificate)), None)
        if signer is None:
            break
        between.remove(signer)
        certificate = signer
    return float("-inf")


def _signed(signer: "x509.Certificate", certificate: "x509.Certificate") -> bool:
    """Tell whether a certificate, or the one that is the signer itself, was signed by the key of a signer."""
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        return certificate == signer
    return True
