"""The local context of a model with memory, what it captures, and what was recalled into it."""
