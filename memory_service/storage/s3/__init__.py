"""Payloads as objects in a bucket of S3: the bucket, the objects, their cache on this machine, and their clean-up."""
