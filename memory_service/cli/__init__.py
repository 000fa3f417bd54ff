"""This folder has the server's commands: `kvbank serve`, and those that care for a data folder."""
