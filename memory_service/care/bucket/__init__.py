"""Backups in a bucket: a prefix has one backup, which each run brings up to date."""
