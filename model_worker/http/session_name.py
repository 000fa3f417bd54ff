"""Which session a request means: what clients call their conversations, in the order in which it counts.

This file owns that a key never names a session, since one key may have many conversations, and that a request that
names none, or wants nothing kept, has no session.
"""

from starlette.requests import Request

from model_worker.http.errors import ApiError
from model_worker.http.requests import ChatRequest
from model_worker.http.response_requests import ResponseRequest

# Our own first, then those of the programs and gateways that send one.
HEADERS = (
    "X-Kvbank-Session",
    "session-id",
    "X-Claude-Code-Session-Id",
    "x-opencode-session",
    "X-Amp-Thread-Id",
    "x-session-affinity",
    "X-Session-Id",
    "X-OpenWebUI-Chat-Id",
)
_LONGEST = 200
_NO_KEY = "invalid_api_key"


def session_name(request: Request, body: ChatRequest | ResponseRequest) -> str:
    """Return the name of the session that a request means; "" for none. Raises ApiError for a name that is none."""
    if body.store is False:
        return ""
    metadata = (body.metadata or {}).get("session_id")
    named = [(name, request.headers.get(name)) for name in HEADERS]
    named += [("prompt_cache_key", body.prompt_cache_key), ("metadata.session_id", metadata)]
    where, name = next(((where, name) for where, name in named if name), ("", ""))
    if len(name) > _LONGEST or not name.isprintable() or name.strip() != name:
        text = f"{where}: a session has a name of 1 to {_LONGEST} printable characters, without blanks at the ends"
        raise ApiError(400, text, param=where, code="invalid_value")
    return name


def key_of(request: Request, *, needed: bool) -> str:
    """Return the key with which a request comes; "" for none.

    needed: whether there has to be one. Raises ApiError where there is none, and for what is no bearer's key.
    """
    given = request.headers.getlist("authorization")
    if not given:
        if needed:
            raise ApiError(401, "this worker needs a key: the header Authorization is 'Bearer KEY'", code=_NO_KEY)
        return ""
    scheme, _, key = given[0].partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not key.strip():
        text = "the header Authorization is 'Bearer KEY', once"
        raise ApiError(401, text, code=_NO_KEY)
    return key.strip()
