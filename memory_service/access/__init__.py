"""This folder says who calls, and how often: keys out of the metadata of a call, which of them are valid, how they are
managed, and the calls a second of tenants."""
