"""The files of a data folder: the folder itself, payloads, what clients stage, and the room on the disks."""
