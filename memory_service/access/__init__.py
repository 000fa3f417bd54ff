"""This folder says who calls: keys out of the metadata of a call, which of them are valid, and how they are managed."""
