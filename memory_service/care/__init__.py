"""Care of a data folder from outside the server: check, repair, backup, restore."""
