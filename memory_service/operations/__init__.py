"""What can be done with banks and chunks, in the order in which each operation does it."""
