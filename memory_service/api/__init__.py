"""The doors of the service: messages of kvbank.v1 come in, operations run, messages go out."""
