"""Care of the data folder of the local engine, from outside the server: check, repair, backup, restore."""
