"""Conversations that outlive processes: their log, their window and their bank."""
