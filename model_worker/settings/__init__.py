"""Settings that a person gives: the model of their fields, flags that are made of it, and a TOML file of it."""
