"""An authority of the tests' own, whose certificates lie in files as an operator has them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme


class Authority:
    """Signs certificates, and writes them to the files of a service in a folder."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.pem = self._ca.cert_pem.bytes()
        self.file = folder / "authority.pem"
        self.file.write_bytes(self.pem)

    def issue(self, *names: str, days: float = 3650, from_days: float = -100) -> trustme.LeafCert:
        """Sign a certificate of these names, which is valid from so many days on, counted from now, until `days`."""
        now = datetime.now(UTC)
        begin, end = now + timedelta(days=from_days), now + timedelta(days=days)
        return self._ca.issue_cert(*names, not_before=begin, not_after=end)

    def settings(self, *names: str, days: float = 3650, clients: bool = False) -> dict[str, Any]:
        """Write a certificate of these names, by default of localhost, to the files of a service, and return the
        settings that name them. clients: whether those need a certificate of this authority."""
        certificate, key = self.put(self.issue(*(names or ("localhost", "127.0.0.1")), days=days))
        return {"tls_cert": certificate, "tls_key": key} | ({"tls_client_ca": str(self.file)} if clients else {})

    def put(self, issued: trustme.LeafCert, name: str = "server") -> tuple[str, str]:
        """Write a certificate and its key to files of this name, and return their paths. Each is replaced at once, one
        after the other, as most tools that renew certificates do it."""
        parts = {"pem": chain(issued), "key": issued.private_key_pem.bytes()}
        for suffix, data in parts.items():
            (self._folder / "new").touch(0o600)
            (self._folder / "new").write_bytes(data)
            (self._folder / "new").rename(self._folder / f"{name}.{suffix}")
        return str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key")


def chain(issued: trustme.LeafCert) -> bytes:
    """Return a certificate with those that it was signed by."""
    return b"".join(pem.bytes() for pem in issued.cert_chain_pems)
