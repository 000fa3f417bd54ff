"""The engine of a PostgreSQL database, in which several services may work at once, with the payloads in a bucket."""
