"""The database of a data folder: its tables, its rows, and the one thread that commits."""
