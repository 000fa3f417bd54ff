"""The statements of the engine, by table. A function that changes rows runs in a transaction of `Database.change`, one
that only reads also in one of `Database.read`."""
