"""Calls reach a server by the files of this package: channels, retries, errors of gRPC, and files on the same host."""
