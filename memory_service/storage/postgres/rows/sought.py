"""Words of callers by which rows are looked for."""


def sought(word: str) -> str:
    """Return a word as a statement takes it. Of what is stored under a word, none has a NUL, which PostgreSQL refuses;
    nor a character that is not printable."""
    return word.replace("\0", "\x01")
