"""The rules of the service, without gRPC, SQL or disk: what banks and chunks are, what requests may say, what the bytes
of a payload are, what is evicted, which hits are the best, how an operation fails. It imports nothing else of the
service."""
