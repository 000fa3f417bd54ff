"""Seeds that a person gives: what every generator of random numbers takes, torch's too."""

LARGEST_SEED = 2**62
