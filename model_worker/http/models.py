"""The routes of `GET /v1/models` tell of the one model that a worker serves."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from model_worker.http.errors import ApiError, json_response
from model_worker.http.session_name import key_of
from model_worker.serve.served import Served


def check_model(served: Served, name: str) -> None:
    """Refuse the name of another model. Raises ApiError."""
    if name != served.name:
        text = f"there is no model {name!r} here; this worker has {served.name!r}"
        raise ApiError(404, text, param="model", code="model_not_found")


def routes(served: Served) -> APIRouter:
    """Return the routes of models."""
    router = APIRouter()

    def described() -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "kvbank"}

    @router.get("/v1/models", operation_id="listModels")
    async def models(request: Request) -> Response:
        """List the models, of which there is one."""
        await run_in_threadpool(served.check, key_of(request, needed=served.needs_key))
        return json_response({"object": "list", "data": [described()]})

    @router.get("/v1/models/{model:path}", operation_id="retrieveModel")
    async def model(request: Request, model: str) -> Response:
        """Describe the model of a name, which may have slashes."""
        await run_in_threadpool(served.check, key_of(request, needed=served.needs_key))
        check_model(served, model)
        return json_response(described())

    return router
