"""Errors of the worker, a branch of the SDK's tree, so that one `except kvbank.KVBankError` catches both.

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
    """Base of what the worker raises; the command line prints its message as one line."""


class UnsupportedModel(WorkerError):
    """The model cannot be attached; the message says why, by layer."""


class ReaderChanged(WorkerError):
    """The model's weights or active adapter changed after attach."""


class BankMismatch(WorkerError):
    """The bank holds K-V of another model, other layers, or embeddings of another embedder."""


class ModelNotFound(WorkerError):
    """No model under this name."""


class SpoolFull(WorkerError):
    """Chunks wait on disk up to the spool's bound, and the service is still away."""


class SessionError(WorkerError):
    """A session that is in use, missing, damaged, or of another model; the message says which."""


class InputError(WorkerError, ValueError):
    """The caller's input makes no sense; the message says what would."""
