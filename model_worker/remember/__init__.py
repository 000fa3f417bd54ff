"""From captured K-V to chunks in a bank, and from a query to blocks that layers attend to."""
