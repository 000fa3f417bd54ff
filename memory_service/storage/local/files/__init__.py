"""The files of a data folder: payloads, their staging, and the folder itself."""
