"""What went wrong, as a client of OpenAI's API is told: a status, and `{"error": {message, type, param, code}}`.

This file owns which error has which status, and that a caller is told nothing of what is behind the worker: the text of
an error that is not the caller's goes to the log alone.
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

import kvbank
from model_worker.errors import BankMismatch, InputError, SessionError
from model_worker.http.requests import TAGS
from model_worker.serve.engine import Busy, Left, Stopping
from model_worker.serve.history import HistoryError
from model_worker.serve.served import Loading

_log = logging.getLogger("kvbank.worker")

_INVALID, _SERVER, _RATE = "invalid_request_error", "server_error", "rate_limit_error"
# Seconds after which to ask again where nobody knows better.
_SOON = 1.0


@dataclass
class ApiError(Exception):
    """An error as it is answered. param: the field of the request that is wrong. retry_after: seconds."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON document of the error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the answer with the error."""
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
        return json_response(self.body(), self.status, headers)


class ErrorBody(BaseModel):
    """What an error says. type: its kind. param: the field of the request that is wrong. code: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorBody


# What the app's document says of errors.
RESPONSES: dict[int | str, dict[str, Any]] = {kind: {"model": ErrorDocument} for kind in ("4XX", "5XX")}


def json_response(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON document in ASCII, which also texts have that are no Unicode."""
    return Response(json.dumps(document), status, headers, "application/json")


@dataclass(frozen=True, slots=True)
class _Told:
    """How errors of some kinds are told. text: None for the error's own, which is about what the caller has sent.

    retry_after: seconds, where the error does not say itself. logged: the text is kept from the caller.
    """

    kinds: tuple[type[BaseException], ...]
    status: int
    type: str
    code: str
    text: str | None = None
    retry_after: float | None = None
    logged: bool = False


# The first that fits counts.
_TABLE = (
    _Told((Busy,), 429, _RATE, "rate_limit_exceeded"),
    _Told((Stopping,), 503, _SERVER, "worker_stopping", retry_after=_SOON),
    _Told((Loading,), 503, _SERVER, "model_loading", retry_after=_SOON),
    _Told((Left,), 499, _INVALID, "left"),
    _Told((InputError, kvbank.InvalidArgument), 400, _INVALID, "invalid_value"),
    _Told((SessionError, BankMismatch), 409, _INVALID, "session_conflict", retry_after=_SOON),
    _Told((kvbank.Unauthenticated,), 401, _INVALID, "invalid_api_key", "the key is missing, or it is not taken"),
    _Told((kvbank.PermissionDenied,), 403, "permission_error", "permission_denied"),
    _Told((kvbank.NotFound,), 404, _INVALID, "not_found", "it is not there, or the key may not have it"),
    _Told((kvbank.TooLarge,), 413, _INVALID, "too_large"),
    _Told((kvbank.RateExceeded,), 429, _RATE, "rate_limit_exceeded", retry_after=_SOON),
    _Told((kvbank.QuotaExceeded, kvbank.BankFull), 429, "insufficient_quota", "insufficient_quota"),
    _Told((kvbank.AlreadyExists, kvbank.FailedPrecondition), 409, _INVALID, "session_conflict"),
    _Told(
        (kvbank.Unavailable, kvbank.DeadlineExceeded, kvbank.Untrusted, kvbank.DiskFull),
        503,
        _SERVER,
        "memory_unavailable",
        "the memory service is away; ask again soon",
        retry_after=_SOON,
        logged=True,
    ),
)
_DEFECT = _Told((), 500, _SERVER, "internal_error", "the worker has failed; its log has the reason", logged=True)


def told(error: BaseException) -> ApiError:
    """Return what a caller is told of an error."""
    if isinstance(error, ApiError):
        return error
    how = next((each for each in _TABLE if isinstance(error, each.kinds)), _DEFECT)
    if how.logged:
        _log.error("a request has failed: %s", how.code, exc_info=error)
    retry_after = getattr(error, "retry_after", None) or how.retry_after
    param = error.where if isinstance(error, HistoryError) else None
    return ApiError(how.status, how.text or str(error), how.type, param, how.code, retry_after)


def of_validation(error: RequestValidationError) -> ApiError:
    """Return what a caller is told of a request that is no JSON, or has a field that is wrong."""
    first = error.errors()[0]
    place = [part for part in first["loc"][1:] if part not in TAGS]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    name = _name(place)
    if not name:
        return ApiError(400, "the body is a JSON object, sent as application/json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not supported by this worker", param=name, code="unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", param=name, code="missing_required_parameter")
    return ApiError(400, f"{name}: {first['msg']}", param=name, code="invalid_value")


def _name(place: list[Any]) -> str:
    """Return a field as a program would write it: "messages[0].content"."""
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def of_http(error: HTTPException) -> ApiError:
    """Return what a caller is told where no route takes the request."""
    texts = {
        404: ("there is no such path", "unknown_url"),
        405: ("this path does not take this method", "method_not_allowed"),
    }
    text, code = texts.get(error.status_code, (str(error.detail), None))
    return ApiError(error.status_code, text, code=code, headers=dict(error.headers or {}))


def register(app: FastAPI) -> None:
    """Let an app answer every error in this form."""

    async def answered(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return of_validation(error).response()
        if isinstance(error, HTTPException):
            return of_http(error).response()
        return told(error).response()

    for kind in (RequestValidationError, HTTPException, ApiError, kvbank.KVBankError, Exception):
        app.add_exception_handler(kind, answered)
