"""Errors of the worker, a branch of the SDK's tree: one `except kvbank.KVBankError` catches those of both.

kvbank.KVBankError
└── WorkerError
    ├── UnsupportedModel   attach refuses: the reason is the message
    ├── ReaderChanged      weights or adapter are no longer those that were attached
    ├── BankMismatch       the bank does not fit this model or embedder
    ├── ModelNotFound      neither a shipped name, a folder with a model, nor a known hub id
    ├── SpoolFull          the service is away and the spool has reached its bound
    ├── SessionError       a session that is in use, missing, damaged, or of another model
    └── InputError         an empty text, an unknown compressor, and the like
"""

import kvbank


class WorkerError(kvbank.KVBankError):
    """Base class of the worker's errors; the command line prints the message of one as a single line."""


class UnsupportedModel(WorkerError):
    """The model cannot be attached; the message says why, by layer."""


class ReaderChanged(WorkerError):
    """The model's weights or active adapter changed after attach."""


class BankMismatch(WorkerError):
    """The bank holds K-V of another model, other layers, or embeddings of another embedder."""


class ModelNotFound(WorkerError):
    """There is no model under this name: neither a shipped one, nor a folder, nor one of the hub."""


class SpoolFull(WorkerError):
    """Chunks wait on disk up to the spool's bound, and the service is still away."""


class SessionError(WorkerError):
    """A session that is in use, missing, damaged, or of another model; the message says which."""


class InputError(WorkerError, ValueError):
    """The caller's input makes no sense; the message says what would."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
