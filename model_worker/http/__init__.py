"""The doors of a worker over HTTP, as clients of OpenAI's API know them."""
