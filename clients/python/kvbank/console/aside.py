"""What goes wrong beside a command, in threads, finalizers and other libraries, becomes a line on stderr or nothing."""

import logging
import os
import signal
import sys
import threading
from typing import Any

from kvbank.console.ending import defect, say, wants_debugging

_AFTER_A_FINALIZER_S = 0.05


def listen() -> None:
    """Take over what Python would print with a traceback. Only for a process in which nothing but a command runs.

    Ctrl-C that arrives in a finalizer, which would swallow it, is given to the command. Other errors of finalizers are
    shown with KVBANK_DEBUG=1 only, because a user can do nothing about them. Errors of threads are defects. Log records
    that no handler takes, of warnings and worse, are lines.
    """
    sys.unraisablehook = _in_a_finalizer
    threading.excepthook = _in_a_thread
    logging.lastResort = _Line(logging.WARNING)


def _in_a_finalizer(found: Any) -> None:
    if issubclass(found.exc_type, KeyboardInterrupt):
        # Not here, where it would be swallowed again; and as a signal, which wakes what waits.
        threading.Timer(_AFTER_A_FINALIZER_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif wants_debugging():
        sys.__unraisablehook__(found)


def _in_a_thread(found: Any) -> None:
    if not issubclass(found.exc_type, SystemExit):
        say(defect(found.exc_value if found.exc_value is not None else found.exc_type()))


class _Line(logging.Handler):
    """A handler that says a log record in one line."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
