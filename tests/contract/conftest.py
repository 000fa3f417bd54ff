"""What holds for every storage engine, asked at the wire."""

from tests.support.serving import caller, connect, data, frames, payload_path, refused, serving, soft, vectors

__all__ = ["caller", "connect", "data", "frames", "payload_path", "refused", "serving", "soft", "vectors"]
