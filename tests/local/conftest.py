"""What the local engine keeps in its folder: files, tables, index, quarantine, and the commands that care for them."""

from tests.support.serving import caller, connect, data, frames, payload_path, refused, serving, soft, vectors

__all__ = ["caller", "connect", "data", "frames", "payload_path", "refused", "serving", "soft", "vectors"]
