"""This folder has what every call passes: its observation, its thread, its turn and its share of memory."""
