"""This folder has the streams: chunks that come in (WriteChunks), and the bytes of answers that go out."""
