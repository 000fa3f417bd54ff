"""The commands of the worker: their options, their checks, and what they show of a report."""
