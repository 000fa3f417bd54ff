"""Measurements on real text, behind `kvbank eval`."""
