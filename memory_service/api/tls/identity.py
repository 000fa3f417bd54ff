"""The certificate by which the service shows clients who it is, with its key and the authorities that its clients'
certificates must be of. This file owns what makes a certificate unfit to be served, each with a sentence of its own.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cryptography import x509

_LEAST_RSA_BITS = 2048
_CURVES = ("secp256r1", "secp384r1")
_MOST_BYTES = 1 << 20


class UnfitError(ValueError):
    """The error for files that cannot be served; its text is one line for the operator, and has nothing of a key."""


class Pem(NamedTuple):
    """The bytes of the files: the certificate with those that it was signed by, its key, and the authorities of
    clients, None where clients need no certificate."""

    certificate: bytes
    key: bytes
    authorities: bytes | None


@dataclass(frozen=True, slots=True)
class Files:
    """The paths of the files, each of which is PEM."""

    certificate: Path
    key: Path
    authorities: Path | None

    def read(self) -> Pem:
        """Read the files as they are now. Errors: UnfitError."""
        authorities = None if self.authorities is None else _read(self.authorities)
        return Pem(_read(self.certificate), _read(self.key), authorities)


@dataclass(frozen=True, slots=True)
class Identity:
    """What the service serves by: bytes that belong together, and the moment at which the certificate expires."""

    pem: Pem = field(repr=False)
    expires: datetime


def checked(files: Files, pem: Pem, now: datetime) -> Identity:
    """Return the identity that these bytes are, where they can be served at this time. files: where the bytes are from.
    Errors: UnfitError."""
    certificate = _certificates(files.certificate, pem.certificate)[0]
    _check_key(files, certificate, pem.key)
    if files.authorities is not None and pem.authorities is not None:
        _certificates(files.authorities, pem.authorities)
    if now >= certificate.not_valid_after_utc:
        raise UnfitError(f"{files.certificate} has expired, on {moment(certificate.not_valid_after_utc)}")
    if now < certificate.not_valid_before_utc:
        raise UnfitError(f"{files.certificate} is not valid before {moment(certificate.not_valid_before_utc)}")
    return Identity(pem, certificate.not_valid_after_utc)


def moment(time: datetime) -> str:
    """Write a time as the messages about certificates have it."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise UnfitError(f"cannot read {path}: {error.strerror}") from None


def _certificates(path: Path, data: bytes) -> "list[x509.Certificate]":
    from cryptography import x509  # here, because a service without TLS can do without 10 MiB

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise UnfitError(f"{path} has no certificate in PEM, or a damaged one") from None


def _check_key(files: Files, certificate: "x509.Certificate", data: bytes) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = _key(files.key, data)
    if isinstance(key, rsa.RSAPrivateKey):
        fit = key.key_size >= _LEAST_RSA_BITS
    else:
        fit = isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES
    if not fit:  # gRPC takes Ed25519 and P-521, and then ends every handshake without a word; RSA of 1024 bits is weak
        raise UnfitError(f"{files.key} is neither RSA of {_LEAST_RSA_BITS} bits or more, nor P-256 or P-384")
    if key.public_key() != certificate.public_key():
        raise UnfitError(f"{files.key} is not the key of {files.certificate}")


def _key(path: Path, data: bytes) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(data, None)
    except TypeError:  # the library's error for a key that needs a password
        raise UnfitError(f"{path} is encrypted; the service takes a key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UnfitError(f"{path} has no private key in PEM, or a damaged one") from None
