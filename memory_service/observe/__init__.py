"""This folder has what operators see of the service: metrics, logs, and the troubles of the moment."""
