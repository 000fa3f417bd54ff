"""What servers of HTTP over a memory service share: where they listen, which service they ask, and with which keys."""
