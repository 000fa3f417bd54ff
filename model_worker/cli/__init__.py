"""The worker's commands."""
