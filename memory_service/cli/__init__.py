"""The server's commands: `kvbank serve`, and those that care for a data folder while no server runs."""
