"""The meaning of what an object store answers instead of an object. This file owns which failures pass by themselves,
so that the request is made again, and the one line in which an operator reads the others: the store's own words have
pages, and name keys."""

import errno
import re

from obstore import exceptions

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>|\(code: (\w+)\)")
_NO_BUCKET = "NoSuchBucket"
# What the library asks where no variable has credentials: the machine itself.
_METADATA = re.compile(r"/latest/(api/token|meta-data)|AssumeRole|/v2/credentials")
_AGAIN_LATER = {"408", "429", "500", "502", "503", "504"}
_AGAIN_LATER_CODES = {"RequestTimeout", "SlowDown", "InternalError", "OperationAborted", "RequestTimeTooSkewed"}
_REFUSED = {"401", "403"}


class Passing(Exception):
    """The error of a request that was answered, and is to be made again."""


class Short(Passing):
    """The end of a body before its length."""


class Taken(Passing):
    """The refusal of a key for the sake of another request, which has not made the object either."""


def passes(error: Exception) -> bool:
    """Tell whether a request that failed so may succeed when it is made again: the store was busy or broken, or a
    connection was cut."""
    if not isinstance(error, exceptions.GenericError):
        return isinstance(error, Passing)
    status, code = _said(error)
    return not (status or code) or status in _AGAIN_LATER or code in _AGAIN_LATER_CODES


def behind_the_end(error: Exception) -> bool:
    """Tell whether a read was refused because the object has no byte from its beginning on."""
    return isinstance(error, exceptions.GenericError) and _said(error)[0] == "416"


def failure(place: object, error: Exception) -> OSError:
    """Return the error for what is above: FileNotFoundError where there is no such object, PermissionError where
    credentials are refused, otherwise an OSError. place: of the objects, for the text."""
    text, (status, code) = str(error), _said(error)
    said = " ".join(filter(None, (status, code)))
    if isinstance(error, FileNotFoundError) and _NO_BUCKET not in text:
        number, words = errno.ENOENT, f"{place} has no such object"
    elif _NO_BUCKET in text:
        # No FileNotFoundError, by which an object alone would be missing.
        number, words = errno.ENODEV, f"the bucket of {place} is not there"
    elif _METADATA.search(text):
        number, words = errno.EACCES, f"there are no credentials for {place}: set AWS_ACCESS_KEY_ID and its secret"
    elif status in _REFUSED or code == "AccessDenied":
        number, words = errno.EACCES, f"{place} refuses the credentials ({said})"
    elif "redirect" in text:
        number, words = errno.EREMOTE, f"{place} is in another region; set AWS_REGION"
    elif "TimedOut" in text or "kind: Timeout" in text:
        number, words = errno.ETIMEDOUT, f"{place} does not answer in time"
    elif said:
        number, words = errno.EIO, f"{place} answers with an error ({said})"
    elif isinstance(error, Taken):
        number, words = errno.EIO, f"{place} is making an object of this name for another request"
    else:
        number, words = errno.EIO, f"{place} cannot be reached, or cuts connections"
    # Of these numbers the first is a FileNotFoundError, EACCES a PermissionError, and ETIMEDOUT a TimeoutError.
    return OSError(number, words)


def _said(error: Exception) -> tuple[str, str]:
    """Return the status and the code of S3 that an error tells; "" for what it does not."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    return status[1] if status else "", code[1] or code[2] if code else ""
