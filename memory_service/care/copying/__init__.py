"""Copies of whole stores, from a data folder into a database with a bucket, and back."""
