"""The commands of the SDK, one file a subject; `kvbank.cli` puts them together."""
