"""How calls reach a server: channels, retries, errors of gRPC, and files on the same host."""
