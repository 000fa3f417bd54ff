"""This folder turns bytes into messages, messages into values of the domain, and values and errors back into bytes."""
