"""The process around the store: settings, limits, fairness, health, metrics, logs and its end."""

from tests.support.serving import caller, connect, data, frames, payload_path, refused, serving, soft, vectors

__all__ = ["caller", "connect", "data", "frames", "payload_path", "refused", "serving", "soft", "vectors"]
