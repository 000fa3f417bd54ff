"""Bounds of the numbers that a person gives to a command."""

# What every generator of random numbers takes, torch's too.
LARGEST_SEED = 2**62
# Of whatever is counted; beyond it torch and Python's itertools fail with errors of their own.
LARGEST_COUNT = 2**31 - 1
