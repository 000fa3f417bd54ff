"""Workers of the peers, run by build/peers/bin/python; each speaks `benchmarks.lines`."""
