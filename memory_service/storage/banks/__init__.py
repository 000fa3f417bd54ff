"""What engines share about banks: the values of their rows, and when a bank is the one that is meant."""
