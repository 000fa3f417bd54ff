"""Rules without gRPC, SQL or disk: what banks and chunks are, what requests may say, what is evicted, how an operation
fails."""
