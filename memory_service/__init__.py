"""The kvbank memory service: gRPC in, banks in the middle, records and payloads below."""

__version__ = "0.1.0"
