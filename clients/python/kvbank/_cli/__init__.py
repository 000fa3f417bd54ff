"""The commands of the SDK are here, one file a subject; `kvbank.commands` puts the commands of all parts together."""
