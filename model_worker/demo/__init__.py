"""The story that `make demo` tells, with what it needs."""
