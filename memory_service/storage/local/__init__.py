"""The engine of one machine: records in SQLite and payload files, in one data folder that one process owns."""
