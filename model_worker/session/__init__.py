"""Conversations that outlive processes."""
