"""The commands of the SDK, one file a subject; `application` puts all together, `ending` is how each ends."""
